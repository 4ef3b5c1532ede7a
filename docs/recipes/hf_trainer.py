"""TOPR in Hugging Face's Trainer, on one GPU or several. Needs transformers 5.19 or later.

    python hf_trainer.py MODEL ROLLOUTS.jsonl OUT
    torchrun --nproc-per-node 8 hf_trainer.py MODEL ROLLOUTS.jsonl OUT

The rollout file needs prompt_ids, completion_ids and logprobs, as eval.py writes them.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from topr import token_logprobs, topr_loss


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
        loss, _ = topr_loss(logp, inputs["mu_logp"], inputs["reward"], inputs["mask"],
                            count=num_items_in_batch)
        loss = loss * self.accelerator.num_processes  # DDP takes the mean over ranks, not the sum
        return (loss, outputs) if return_outputs else loss


def remove_dropout(model):
    """pi/mu must be 1 before the first step. eval() does not last: every step calls train()."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_dropout = "drop" in name or isinstance(module, torch.nn.Dropout)
            if is_dropout and isinstance(value, float):
                setattr(module, name, 0.0)


def collate(rows):
    """Rollouts to tensors, [batch, time]. The mask comes from lengths, not from a pad token."""
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    shape = len(rows), max(lengths)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long),
             "attention_mask": torch.zeros(shape, dtype=torch.long),
             "mask": torch.zeros(shape, dtype=torch.bool), "mu_logp": torch.zeros(shape)}
    for number, (row, length) in enumerate(zip(rows, lengths)):
        start, ids = len(row["prompt_ids"]), row["prompt_ids"] + row["completion_ids"]
        batch["input_ids"][number, :length] = torch.tensor(ids)
        batch["attention_mask"][number, :length] = 1
        batch["mask"][number, start:length] = True
        batch["mu_logp"][number, start:length] = torch.tensor(row["logprobs"])
    return batch | {"reward": torch.tensor([row["reward"] for row in rows])}


def main(model_name, rollouts, out, collate=collate, **changes):
    with open(rollouts) as file:
        rows = [json.loads(line) for line in file]
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    remove_dropout(model)
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4,
                "learning_rate": 1e-6, "lr_scheduler_type": "constant", "num_train_epochs": 1,
                "save_strategy": "no", "logging_steps": 1}
    arguments = TrainingArguments(out, remove_unused_columns=False, **(settings | changes))
    trainer = ToprTrainer(model, arguments, data_collator=collate, train_dataset=rows,
                          processing_class=AutoTokenizer.from_pretrained(model_name))
    trainer.train()
    trainer.save_model(out)  # from_pretrained reads it, and so do eval.py and vLLM
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
