"""TOPR as a subclass of TRL's KTOTrainer. Needs TRL 1.16; one GPU or several.

    python docs/recipes/trl_trainer.py MODEL ROLLOUTS --output_dir OUT --learning_rate 5e-6
    torchrun --nproc-per-node 8 docs/recipes/trl_trainer.py MODEL ROLLOUTS --output_dir OUT

Every option of KTOConfig is one here. TRL's part: padding, log mu (its reference
log-probabilities), LoRA, saving. Ours: the loss. Rewards must be +1 and -1: KTO knows a label.
"""

import os
import sys

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import KTOConfig, KTOTrainer

sys.path.append(os.path.join(os.path.dirname(__file__), "../.."))  # topr.py and engine/ are there
from engine.rollouts import read_rollouts
from engine.tokens import end_token_of, token_ids
from topr import token_logprobs, topr_loss

DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 1,
    "save_strategy": "no",
    "logging_steps": 1,
    "bf16": torch.cuda.is_available(),
    "precompute_ref_log_probs": True,  # log mu, once, before the first step
    "loss_type": "apo_zero_unpaired",  # the loss is ours; this name computes no KL batches
    "disable_dropout": True,  # else pi/mu is not 1 before the first step
    "max_length": None,
}


class ToprTrainer(KTOTrainer):
    loss_is_scaled_for_ga = True  # the loss is already a share of the whole optimizer step's

    def _prepare_dataset(self, dataset, *_):
        """TRL would tokenize the text again and put an end token after completions cut off."""
        return dataset

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, and N: its sequences over micro-batches and ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(len(batch["label"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["completion_mask"].bool()  # [batch, time]
        outputs = model(input_ids=ids, attention_mask=inputs["attention_mask"])
        logp = token_logprobs(outputs.logits, ids)  # [batch, time]
        # TRL keeps the sum of log mu over the tokens. d is a difference of sums, so that any
        # way to spread it over the tokens gives the same loss.
        mu_logp = (inputs["ref_logps"] / mask.sum(1))[:, None].expand_as(logp)  # [batch, time]
        reward = torch.where(inputs["label"], 1.0, -1.0)  # [batch]
        loss, _ = topr_loss(logp, mu_logp, reward, mask, count=num_items_in_batch)
        loss = loss * self.accelerator.num_processes  # DDP takes the mean over ranks, not the sum
        return (loss, outputs) if return_outputs else loss


def main(model_name, rollouts, arguments):
    # disable_dropout reaches nn.Dropout alone; Llama and Qwen have attention_dropout
    config = AutoConfig.from_pretrained(model_name, attention_dropout=0.0)
    model = AutoModelForCausalLM.from_pretrained(model_name, config=config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    rows = read_rollouts(rollouts)
    end_token = end_token_of(model, tokenizer)
    tokens = [token_ids(row, tokenizer, end_token) for row in rows]
    data = [
        {"prompt_ids": prompt, "completion_ids": completion, "label": row["reward"] > 0}
        for row, (prompt, completion) in zip(rows, tokens)
    ]
    shared = Dataset.from_generator(lambda: iter(data))  # on disk, where TRL wants it for all ranks
    trainer = ToprTrainer(model, args=arguments, train_dataset=shared, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = HfArgumentParser(KTOConfig)
    parser.add_argument("model")
    parser.add_argument("rollouts")
    parser.set_defaults(**DEFAULTS)
    arguments, files = parser.parse_args_into_dataclasses()
    main(files.model, files.rollouts, arguments)
