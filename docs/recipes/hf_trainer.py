"""TOPR in Hugging Face's Trainer, on one GPU or several. Needs transformers 5.19 or later.

    python docs/recipes/hf_trainer.py MODEL ROLLOUTS --output_dir OUT --learning_rate 5e-6
    torchrun --nproc-per-node 8 docs/recipes/hf_trainer.py MODEL ROLLOUTS --output_dir OUT

Every option of TrainingArguments is one here. MODEL must have written the rollouts: log mu is
computed with it before the first step.
"""

import os
import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

sys.path.append(os.path.join(os.path.dirname(__file__), "../.."))  # topr.py and engine/ are there
from engine.rollouts import read_rollouts
from engine.tokens import end_token_of, token_ids
from topr import completion_logprobs, token_logprobs, topr_loss

DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 1,
    "save_strategy": "no",
    "logging_steps": 1,
    "remove_unused_columns": False,
}


class ToprTrainer(Trainer):
    loss_is_scaled_for_ga = True  # else Trainer guesses whether to divide it by the micro-batches

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step, and N: its sequences over micro-batches and ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(len(batch["reward"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]  # [batch, time]
        # Call `model` itself: called past its DDP wrapper, it exchanges no gradients.
        outputs = model(input_ids=ids, attention_mask=inputs["attention_mask"])
        logp = token_logprobs(outputs.logits, ids)  # [batch, time]
        loss, _ = topr_loss(
            logp, inputs["mu_logp"], inputs["reward"], inputs["mask"], count=num_items_in_batch
        )
        loss = loss * self.accelerator.num_processes  # DDP takes the mean over ranks, not the sum
        return (loss, outputs) if return_outputs else loss


def remove_dropout(model):
    """pi/mu must be 1 before the first step. eval() does not last: every step calls train()."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_dropout = "drop" in name or isinstance(module, torch.nn.Dropout)
            if is_dropout and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def read_rows(path, model, tokenizer):
    """A dict of tensors for each rollout. The mask comes from lengths, not from a pad token."""
    rollouts, rows = read_rollouts(path), []
    end_token = end_token_of(model, tokenizer)
    for rollout in rollouts:
        prompt, completion = token_ids(rollout, tokenizer, end_token)
        ids = torch.tensor(prompt + completion, device=model.device)  # [time]
        mask = torch.arange(len(ids), device=model.device) >= len(prompt)  # [time]
        mu_logp = completion_logprobs(model, ids[None], mask[None])[0]  # [time]
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mask": mask,
                "mu_logp": mu_logp,
                "reward": torch.tensor(rollout["reward"]),
            }
        )
    return [{name: value.cpu() for name, value in row.items()} for row in rows]


def collate(rows):
    """[batch, time] each, padded on the right; reward: [batch]"""
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True)
        for name in rows[0]
        if name != "reward"
    }
    return batch | {"reward": torch.stack([row["reward"] for row in rows])}


def main(model_name, rollouts, arguments):
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    remove_dropout(model)
    rows = read_rows(rollouts, model.to(arguments.device), tokenizer)
    trainer = ToprTrainer(
        model, arguments, data_collator=collate, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()  # from_pretrained reads it, and so do eval.py and vLLM
    return trainer


if __name__ == "__main__":
    parser = HfArgumentParser(TrainingArguments)
    parser.add_argument("model")
    parser.add_argument("rollouts")
    parser.set_defaults(**DEFAULTS)
    arguments, files = parser.parse_args_into_dataclasses()
    main(files.model, files.rollouts, arguments)
