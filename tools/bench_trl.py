"""TRL's trainers as contestants of bench.py, and how a contestant takes turns. Needs TRL alone, none of our code.

python tools/bench_trl.py kto|dpo MODEL ROLLOUTS.jsonl checkpointing|plain
"""

import json
import sys


def my_turn():
    """Says that the last turn is done, with this process's peak memory in GiB; False when no other is wanted."""
    with open("/proc/self/status") as file:  # not getrusage: its maximum begins with the parent's
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
    print(f"@{peak}", flush=True)
    return sys.stdin.readline() == "go\n"


def main(kind, model, rollouts, memory):
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not my_turn():
                sys.exit()

    with open(rollouts) as file:
        rows = [json.loads(line) for line in file]
    data = [
        {"prompt": row["prompt"], "completion": row["completion"], "label": row["reward"] > 0}
        for row in rows
    ]
    if kind == "dpo":
        better, worse = ([row for row in data if row["label"] == label] for label in (True, False))
        data = [
            {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
            for a, b in zip(better, worse)
        ]
    trainer, config = {
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
    }[kind]
    arguments = config(
        f"{rollouts}.{kind}",
        per_device_train_batch_size=len(data),
        max_steps=10**6,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=memory == "checkpointing",
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer(
        model, args=arguments, train_dataset=Dataset.from_list(data), callbacks=[Turns()]
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
