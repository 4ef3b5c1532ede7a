"""--lora, which needs the package peft: the same update as a plain loop with peft, on any number of
ranks, and a folder that opens without it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import topr
import train
from conftest import ROOT, furthest, torchrun, train_settings, weights_of
from engine import batches, lora, sampler
from engine.parallel import whole_weights

peft = pytest.importorskip("peft")
OPTIONS = dict(lora=4, learning_rate=1e-2, sequences=10)


@pytest.fixture(scope="module")
def adapted(tiny, rollouts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "out"
    log = train.train(train_settings(tiny, rollouts, folder, **OPTIONS))
    return folder, log


def test_the_update_is_that_of_a_plain_loop(tiny, rollouts, adapted):
    """Loss and gradient norm of every step, and the weights in the end."""
    folder, log = adapted
    torch.manual_seed(0)
    settings = train_settings(tiny, rollouts, folder, **OPTIONS)
    start, tokenizer = sampler.load_model(tiny, settings, "cpu")
    data = batches.read_data(settings, start, tokenizer)
    model = peft.get_peft_model(
        start,
        peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0)
    for step, entry in enumerate(log):
        total = 0.0
        for unit in batches.step_units(settings, data, step):
            row = data.rows[unit[0]]
            ids = torch.tensor([[*row.prompt, *row.completion.tolist()]])  # [1, time]
            mask = torch.arange(ids.shape[1])[None] >= len(row.prompt)  # [1, time]
            mu_logp = torch.zeros(ids.shape).masked_scatter(mask, torch.from_numpy(row.logprobs))
            logp = topr.token_logprobs(model(input_ids=ids).logits, ids)
            loss, _ = topr.topr_loss(
                logp, mu_logp, torch.tensor([row.reward]), mask, count=entry["sequences"]
            )
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert entry["loss"] == pytest.approx(total, abs=1e-5)
        assert entry["gradient_norm"] == pytest.approx(norm.item(), abs=1e-5)
    assert furthest(weights_of(folder), model.merge_and_unload().state_dict()) < 1e-4


def test_what_is_saved_opens_with_and_without_peft(tiny, adapted):
    folder, _ = adapted
    ids = torch.arange(12)[None]
    merged = AutoModelForCausalLM.from_pretrained(folder)
    adapter = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny), folder / "adapter"
    )
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits.log_softmax(-1) for model in (merged, adapter))
    assert (one - other).abs().max() < 1e-5
    assert furthest(folder, tiny) > 1e-3


def test_a_run_that_was_stopped_goes_on_exactly(tiny, rollouts, adapted, tmp_path, monkeypatch):
    folder, _ = adapted
    settings = train_settings(tiny, rollouts, tmp_path, checkpoint_every=2, **OPTIONS)
    own = train.backward

    def dies(settings, policy, data, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        return own(settings, policy, data, step, *rest)

    monkeypatch.setattr(train, "backward", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train(settings)
    monkeypatch.setattr(train, "backward", own)
    train.train(settings)
    assert furthest(folder, tmp_path) == 0


@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_two_ranks(tiny, rollouts, adapted, tmp_path, options):
    folder, _ = adapted
    result = torchrun(
        2,
        ROOT / "train.py",
        "--model",
        tiny,
        "--rollouts",
        rollouts,
        "--out",
        tmp_path,
        "--lora",
        4,
        "--learning-rate",
        "1e-2",
        "--sequences",
        10,
        *options,
    )
    assert result.returncode == 0, result.stdout
    assert furthest(folder, tmp_path) < 1e-5


def test_square_weights_of_gpt2_are_merged_the_right_way_round():
    """GPT-2 holds its weights as [in, out]: of square ones the shape did not tell, and the merged
    model wrote other text than the one that was trained."""
    sizes = dict(vocab_size=50, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model, ids = GPT2LMHeadModel(GPT2Config(**sizes)).eval(), torch.arange(10)[None]
    lora.add_adapters(train.Settings(model="gpt2", lora=4), model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    expected, merged = model(ids).logits, GPT2LMHeadModel(model.config).eval()
    lora.merge(model)
    merged.load_state_dict(lora.without_adapters(whole_weights(model)), strict=False)
    assert (merged(ids).logits - expected).abs().max() < 1e-4
