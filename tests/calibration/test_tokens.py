"""Tokens: padding counts nowhere, and outputs of language models are compared token by token."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.calibration import divergence as compared
from lnr_prune.calibration.divergence import as_rows, output_error
from lnr_prune.calibration.functions.ending import before_last
from lnr_prune.calibration.functions.pause import Manner, Pause, Replay, go_on
from lnr_prune.graph.module import evaluating, named_tensors
from lnr_prune.refit import fit
from lnr_prune.refit.regression import softmax_regression
from lnr_prune.runtime.optional import import_torchvision
from tests.helpers.language import WORDS, TinyLlama, padded, sentences, unpadded
from tests.helpers.models import mlp

AMOUNTS: dict[str, dict[str, Any]] = {
    "backward": {"amount": lnr.Keep(0.5), "selector": "backward"},
    "lasso": {"amount": lnr.Penalty(ratio=0.5), "logits": True},
    "budget": {"amount": lnr.Budget(params=0.7, effort=lnr.Effort(samples=12, refits=2)), "logits": True},
}


def language_model(seed: int = 0) -> TinyLlama:
    torch.manual_seed(seed)
    return TinyLlama().double().eval().requires_grad_(False)


def same(one: lnr.Pruned, other: lnr.Pruned) -> None:
    assert one.masked.keys() == other.masked.keys()
    for name, value in one.masked.items():
        torch.testing.assert_close(value, other.masked[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", AMOUNTS)
def test_a_padded_batch_is_its_sentences(name: str) -> None:
    model = language_model()
    texts = sentences(8)
    one, alone = (lnr.prune(model, batches, **AMOUNTS[name]) for batches in (padded(texts), unpadded(texts)))
    same(one, alone)
    assert one.report.error == pytest.approx(alone.report.error, rel=1e-5)
    rows = {layer.samples for layer in one.report.layers}
    assert rows == {sum(text.numel() for text in texts)}


def test_a_function_says_what_counts() -> None:
    model, batches = language_model(), padded(sentences(8))
    for batch in batches:
        batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]  # what is no text is 0
    causal = [batch["input_ids"] for batch in batches]  # padding comes last: what is before does not see it

    def prune(counts: Callable[..., Tensor] | None) -> lnr.Pruned:
        data = lnr.Batches(causal, lambda ids: ((ids,), {}), counts)
        return lnr.prune(model, data, lnr.Keep(0.5), selector="backward", logits=True)

    same(prune(lambda ids: ids != 0), lnr.prune(model, batches, lnr.Keep(0.5), selector="backward", logits=True))
    with pytest.raises(lnr.CalibrationError, match=r"counts\(\) returned torch.bool of shape \(9, 24\), expected"):
        prune(lambda ids: (ids != 0).T)
    with pytest.raises(TypeError, match="counts must be a function"):
        lnr.Batches(causal, lambda ids: ((ids,), {}), 3)  # type: ignore[arg-type]


def test_data_that_is_all_padding_is_refused() -> None:
    batches = [{**batch, "attention_mask": 0 * batch["attention_mask"]} for batch in padded(sentences(2))]
    with pytest.raises(lnr.CalibrationError, match="nothing of the calibration data counts"):
        lnr.prune(language_model(), batches, lnr.Keep(0.5), refit=None)


def test_padding_does_not_count_where_two_layers_are_refitted_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    torch.manual_seed(0)
    model, x, mask = Twice(), torch.randn(60, 5, 4), torch.arange(5).expand(60, 5) < torch.randint(2, 6, (60, 1))
    other = x.where(mask[..., None], 100 * torch.randn(60, 5, 4))
    found = [lnr.prune(model, [(each, mask)], lnr.Keep(0.5), refit=lnr.Refit(window=2)) for each in (x, other)]
    same(*found)


def test_activations_without_positions_all_count() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.down = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.up(x).relu() * attention_mask[..., None]
            return self.down(self.mix(h.sum(1) / attention_mask.sum(1, keepdim=True)).relu())

    mask = torch.arange(5).expand(30, 5) < torch.randint(2, 6, (30, 1))
    report = lnr.prune(Pooled(), [(torch.randn(30, 5, 4), mask)], lnr.Keep({"mix": 0.5, "up": 0.5})).report
    assert {row.name: row.samples for row in report.layers} == {"mix": 30, "down": 30}


def test_the_error_is_the_divergence_of_a_token() -> None:
    model, batches = language_model(), padded(sentences(8), 2)
    pruned = lnr.prune(model, batches, lnr.Keep(0.5), logits=True)
    p, q = (
        torch.cat([net(**batch)[batch["attention_mask"] != 0] for batch in batches]).log_softmax(1)
        for net in (model, pruned.model)
    )
    mean = p.exp().mean(0).log()
    expected = ((p.exp() * (p - q)).sum(1).mean() / (p.exp() * (p - mean)).sum(1).mean()).item()
    assert pruned.report.error == pytest.approx(expected, rel=1e-6)
    assert [row.softmax for row in pruned.report.layers][-1]


def test_logits_count_alone() -> None:
    logits, cache = torch.randn(2, 3, 4), torch.randn(2, 7, 5)
    assert torch.equal(as_rows({"logits": logits, "past_key_values": (cache,)}), logits.flatten(0, 1))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(as_rows({"logits": logits}, mask=mask), logits[mask])
    assert torch.equal(as_rows(logits), logits.flatten(1))
    assert torch.equal(as_rows(logits, mask=mask), logits[mask])
    both = as_rows((logits, logits[:, 0]), mask=mask)
    assert both.shape == (2, 16)
    assert int(both.isnan().sum()) == 12


def test_a_fit_of_logits_stays_in_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = mlp(6, 24, 4), torch.randn(40, 10, 6)
    seen = list[torch.Size]()

    def watched(x: Tensor, *rest: Any, **options: Any) -> Tensor | None:
        seen.append(x.shape)
        return softmax_regression(x, *rest, **options)

    monkeypatch.setattr(fit, "softmax_regression", watched)
    monkeypatch.setattr(fit, "PROBABLE", 100 * (24 + 1 + 4))
    lnr.prune(model, x.split(10), lnr.Keep(0.5), logits=True)
    assert seen == [(100, 25)]
    monkeypatch.setattr(fit, "LARGEST", 99)
    assert not lnr.prune(model, x.split(10), lnr.Keep(0.5), logits=True).report.layers[-1].softmax
    assert len(seen) == 1


def test_outputs_that_are_not_kept_are_computed_again_from_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = language_model(), padded(sentences(4), 4)
    calls: list[Any] = [((), batch) for batch in batches]
    tensors = named_tensors(model)
    changes = [{name: 0.9 * tensors[name]} for name in ("layers.0.up_proj.weight", "head.weight")]
    expected = [output_error(model, calls, True)(change) for change in changes]
    monkeypatch.setattr(compared, "HELD", calls[0][1]["input_ids"].numel() * WORDS)  # the first batch is kept
    monkeypatch.setattr(compared, "CHUNK", 2 * WORDS)
    waiting = list[Pause]()

    def watched(*arguments: Any) -> Pause | None:
        found = before_last(*arguments)
        assert found is not None
        waiting.append(found)
        return found

    monkeypatch.setattr(compared, "before_last", watched)
    error = output_error(model, calls, True)
    assert [error(change) for change in changes] == pytest.approx(expected, rel=1e-9)
    assert len(waiting) == len(calls) - 1
    with evaluating(model):
        replay = Replay(waiting[0].copied(tensors.values()))
        go_on(model, waiting[0], replay, Manner())
    assert nn.functional.embedding not in replay.functions[len(waiting[0].functions) :]
    assert replay.functions[len(waiting[0].functions) :].count(nn.functional.linear) == 1


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_padded_batch_is_its_sentences_for_transformers(kind: str) -> None:
    """Of GPT-2, layers see samples and positions as one axis; among the outputs of both are key-value caches."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch.manual_seed(0)
    words = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {
        "Llama": {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2},
        "GPT2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
    }
    settings = getattr(transformers, f"{kind}Config")(**words, **sizes[kind])
    model = getattr(transformers, {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[kind])(settings).double()
    texts, names = sentences(8)[1:], [name for name, _ in model.named_modules() if name.endswith(("up_proj", "c_fc"))]
    one, alone = (
        lnr.prune(model.eval(), batches, lnr.Keep(dict.fromkeys(names, 0.5)), selector="backward", logits=True)
        for batches in (padded(texts), unpadded(texts))
    )
    same(one, alone)
    assert one.report.error == pytest.approx(alone.report.error, rel=1e-5)
    assert {row.samples for row in one.report.layers} == {sum(text.numel() for text in texts)}
