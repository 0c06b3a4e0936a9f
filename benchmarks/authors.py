"""The table in benchmarks/AUTHORS.md: kvloom's codecs beside their authors' quantisers, on the same keys and values.

    python -m benchmarks.authors          # measures and writes; minutes on one core
    python -m benchmarks.authors --docs   # the table again, from the kept results, after a change of words

Keys and values are SmolLM2-135M-Instruct's own, of windows of real text, without the four sinks. Errors are those of
what comes back, relative to what went in (Frobenius norms), of blocks of 256 tokens of a head; a figure is the mean of
all blocks, its interval a bootstrap over them. Beside kvloom stand the authors' libraries, or the packages that
implement a paper, where they run on a CPU (`benchmarks/packages.py` says how to install them), in float32, so that they
keep scales with twice the bytes; else the published formula in float64 (`benchmarks/formulas.py`).

A test holds AUTHORS.md to `benchmarks/authors.json`.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from benchmarks import formulas
from benchmarks.formulas import in_groups, min_max
from benchmarks.methods import FOLDER, between, insert
from benchmarks.packages import package_contestants
from kvloom.assets import CALIBRATION, EVALUATION, MODEL_NAME, load_model, texts, token_windows
from kvloom.codecs import as_stored
from kvloom.errors import DataError
from kvloom.evaluate import Contestant, model_name, peer_contestants
from kvloom.evaluate._bootstrap import Estimate, block_mean
from kvloom.pages import page_tokens_of, side_nbytes
from kvloom.plan import Fingerprint, LayerPlan, Plan, TensorSpec, import_plan, preset
from kvloom.signals import calibrate_codebooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")

LAYERS = (0, 6, 12, 18, 24, 29)
SINKS, TOKENS, WINDOWS, BLOCK = 4, 2048, 2, 256
PROMPTS, PROMPT_TOKENS = 4, 512
SPARSE = 0.01
QUAROT_CLIP = 0.95

KEPT, PAGE = FOLDER / "authors.json", FOLDER / "AUTHORS.md"
BEGIN, END = "<!-- authors: written by benchmarks/authors.py -->", "<!-- /authors -->"


@dataclass(frozen=True)
class States:
    """Keys and values of one layer in one window.

    Attributes:
        layer: Index of the layer.
        key: fp32 ``[kv_heads, tokens, head_dim]``, as cached.
        before: The same before RoPE.
        value: Likewise.
    """

    layer: int
    key: Tensor
    before: Tensor
    value: Tensor

    def of(self, side: Side, spec: TensorSpec) -> Tensor:
        """What a format is given."""
        if spec.pre_rope:
            return self.before
        return self.key if side == "key" else self.value


Quantiser = Callable[[States, Side], Tensor]
"""To ``[kv_heads, tokens, head_dim]``."""


@dataclass(frozen=True)
class Row:
    """A method at one setting.

    Attributes:
        name: In the table and the results.
        source: Paper, repository or package.
        ours: What kvloom stores, a layer each; a side whose authors cannot run it is left out of ``bits``.
        theirs: What gives back the authors' tensors.
        by: What that is: a library with its version, or ``formula``.
        bits: Bits an element of theirs, scales in 16 bits.
    """

    name: str
    source: str
    ours: Callable[[int], LayerPlan]
    theirs: Quantiser
    by: str
    bits: dict[Side, float]


def _by_formula(x: Tensor, spec: TensorSpec, rows: formulas.Rows) -> Tensor:
    return in_groups(x.double(), spec.grouping, spec.format(x.shape[-1]).group_size, rows)


def _grouped(name: str, source: str, plan: Plan, formula: Callable[[Tensor, int], Tensor], params: int = 2) -> Row:
    """A row whose formula has the groups and widths of ours."""

    def theirs(states: States, side: Side) -> Tensor:
        spec = getattr(plan.spec(states.layer), side)
        return _by_formula(states.of(side, spec), spec, partial(formula, bits=spec.bits))

    first = plan.spec(0)
    sizes = {side: getattr(first, side).format(plan.model.head_dim) for side in SIDES}
    bits: dict[Side, float] = {side: fmt.bits + 16 * params / fmt.group_size for side, fmt in sizes.items()}
    return Row(name, source, plan.spec, theirs, "formula", bits)


def _specs(shape: Fingerprint, key: TensorSpec, value: TensorSpec) -> Plan:
    return Plan.from_specs(shape, dict.fromkeys(shape.packed_layers, (key, value)))


_KIVI, _KVTUNER, _KVMIX = "KIVI, arXiv 2402.02750", "KVTuner, arXiv 2502.04420", "KVmix, arXiv 2506.08018"


def kivi(shape: Fingerprint) -> Iterator[Row]:
    """Its presets."""
    for bits in (2, 4):
        yield _grouped(f"`kivi/K{bits}V{bits}`", _KIVI, preset(f"kivi/K{bits}V{bits}", shape), min_max)


def kvtuner(shape: Fingerprint) -> Iterator[Row]:
    """Its two schemes and the axes, grids and group sizes between them, as the importer reads them."""
    schemes = {
        "per token, a head": {"axis_key": 0, "q_group_size": -1},
        "per token, groups of 32": {"axis_key": 0, "q_group_size": 32},
        "keys per channel, groups of 32": {"axis_key": 1, "q_group_size": 32},
        "keys per channel, groups of 64": {"axis_key": 1, "q_group_size": 64},
    }
    for scheme, fields in schemes.items():
        for asym, formula in ((True, formulas.kvtuner_asymmetric), (False, formulas.kvtuner_symmetric)):
            for bits in (2, 4, 8):
                config = {"nbits": bits, "axis_value": 0, "asym": asym, "residual_length": 0, **fields}
                name = f"KVTuner {bits} bits, {scheme}, {'asymmetric' if asym else 'symmetric'}"
                yield _grouped(name, _KVTUNER, import_plan(config, "kvtuner", shape), formula, 1 + asym)


def kvmix(shape: Fingerprint) -> Iterator[Row]:
    """Its four widths; its 3-bit values need a head_dim that is a multiple of eleven."""
    for bits in (1, 2, 3, 4):
        table = {layer: {"k_bits": bits, "v_bits": 2 if bits == 3 else bits} for layer in shape.packed_layers}
        plan = import_plan({"quant_bits": table, "ratios": "repository"}, "kvmix", shape, substitute=True)
        row = _grouped(f"KVmix {bits} bits", _KVMIX, plan, min_max)
        yield _eleven(row) if bits == 3 else row


def _eleven(row: Row) -> Row:
    def theirs(states: States, side: Side) -> Tensor:
        x = states.of(side, row.ours(states.layer).key)
        return in_groups(x.double(), "per_channel", 11, formulas.eleven)

    return Row("KVmix 3 bits, keys", row.source, row.ours, theirs, "formula", {"key": 64 / 11})


def hqq(shape: Fingerprint) -> Iterator[Row]:
    """The library's quantiser on both axes; and KVQ's configuration of it."""
    for label, grouping in (("a head", "per_token"), ("64 tokens of a channel", "per_channel")):
        size: Any = "head_dim" if grouping == "per_token" else 64
        for bits in (2, 3, 4):
            spec = TensorSpec(codec="hqq", bits=bits, grouping=grouping, group_size=size)
            yield _hqq(f"hqq {bits} bits, {label}", "HQQ (Badri and Shaji 2023)", _specs(shape, spec, spec))
    later = import_plan({"nbits": {"k": 4, "v": 2}}, "kvq-norm", shape)
    yield _hqq("KVQ 0.1 K4V2", "KVQ, arXiv 2502.15075", later)


def _hqq(name: str, source: str, plan: Plan) -> Row:
    def theirs(states: States, side: Side) -> Tensor:
        spec = getattr(plan.spec(states.layer), side)
        return _by_formula(states.of(side, spec), spec, partial(_hqq_library, bits=spec.bits)).float()

    first = plan.spec(0)
    bits: dict[Side, float] = {side: getattr(first, side).bits + 0.5 for side in SIDES}
    return Row(name, source, plan.spec, theirs, f"hqq {version('hqq')}", bits)


def _hqq_library(rows: Tensor, bits: int) -> Tensor:
    """As `QuantizedCache` of transformers calls it, but for its shape: 3 bits are decoded of matrices only."""
    from hqq.core.quantize import Quantizer

    options = {"nbits": bits, "group_size": rows.shape[-1], "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    codes, meta = Quantizer.quantize(rows.float(), **options)
    meta["compute_dtype"] = torch.float32
    decoded: Tensor = Quantizer.dequantize(*Quantizer.cuda(codes, meta, device="cpu"))
    return decoded.double()


def quanto(shape: Fingerprint, model: PreTrainedModel) -> Iterator[Row]:
    """`QuantizedCache` of transformers on quanto: the codec of that name, and KVQ's first form, which is that cache."""
    library = f"transformers {version('transformers')}, optimum-quanto {version('optimum-quanto')}"
    found = {it.name: it for it in _of_quanto(model)}
    for bits in (2, 4):
        key = TensorSpec(codec="quanto", bits=bits, grouping="per_channel", group_size=64)
        value = TensorSpec(codec="quanto", bits=bits, grouping="per_token", group_size="head_dim")
        plan, both = _specs(shape, key, value), dict.fromkeys(SIDES, found[f"quanto {bits}b, best axes"])
        yield Row(f"quanto {bits} bits", "optimum-quanto", plan.spec, _through(both), library, _halves(bits, bits))
    caches: dict[Side, Contestant] = {"key": found["quanto 4b, as it comes"], "value": found["quanto 2b, as it comes"]}
    source = "KVQ, arXiv 2502.15075"
    yield Row("`kvq/K4V2`", source, preset("kvq/K4V2", shape).spec, _through(caches), library, _halves(4, 2))


def _halves(key: int, value: int) -> dict[Side, float]:
    """Bits with two parameters for 64 elements."""
    return {"key": key + 0.5, "value": value + 0.5}


def _of_quanto(model: PreTrainedModel) -> list[Contestant]:
    peers = peer_contestants(model, bits=(2, 4))
    found = [it for it in peers.contestants if it.method == "quanto"]
    if not found:
        raise DataError(" ".join(peers.notes))
    return found


def _through(caches: dict[Side, Contestant]) -> Quantiser:
    """Through a cache's own updates; one that shows a pass its own tokens exactly shows the next what it packed."""

    def theirs(states: States, side: Side) -> Tensor:
        cache, both = caches[side].make_cache(), (states.key[None], states.value[None])
        shown = cache.update(*both, states.layer)
        if caches[side].within_pass != "quantized":
            shown = cache.update(*(x[..., :1, :] for x in both), states.layer)
        decoded: Tensor = shown[SIDES.index(side)][0, :, :TOKENS]
        return decoded

    return theirs


def packages(shape: Fingerprint, model: PreTrainedModel) -> Iterator[Row]:
    """Packages beside the codec of the paper that they implement."""
    found = package_contestants(model)
    by_name = {it.name: it for it in found.contestants}
    if missing := [note for note in found.notes if "turboquant" in note]:
        raise DataError(" ".join(missing))
    for bits in (2, 3, 4):
        own = by_name[f"turboquant K{bits}V{bits}"]
        head = partial(TensorSpec, bits=bits, grouping="per_token", group_size="head_dim")
        lloyd = _specs(shape, *2 * [head(codec="lloyd", symmetric=True, rotation="hadamard")])
        both, taken = dict.fromkeys(SIDES, own), dict.fromkeys(SIDES, bits + 0.25)
        library = f"turboquant {own.settings['version']}"
        yield Row(f"turboquant {bits} bits", _TURBO, lloyd.spec, _through(both), library, taken)
    for bits in (2, 3, 4):
        own = by_name[f"tiny-turboquant K{bits}V{bits}"]
        plan = Plan.uniform(shape, bits, bits, key_group_size=128)
        taken = {"key": bits + 0.25, "value": bits + 0.5}
        library = f"tiny-turboquant {own.settings['version']}"
        both = dict.fromkeys(SIDES, own)
        yield Row(f"tiny-turboquant {bits} bits", "grouping: KIVI", plan.spec, _through(both), library, taken)


_TURBO = "TurboQuant, arXiv 2504.19874"


def rotated(shape: Fingerprint) -> Iterator[Row]:
    """TurboQuant-MSE; and QuaRot, without and with its clip ratio, which the clip search stands beside."""
    dim = shape.head_dim
    for bits in (1, 2, 3, 4):
        spec = TensorSpec(
            codec="lloyd", bits=bits, grouping="per_token", group_size="head_dim", symmetric=True, rotation="hadamard"
        )
        turbo = _plain(partial(formulas.turboquant_mse, bits=bits))
        taken = dict.fromkeys(SIDES, bits + 16 / dim)
        yield Row(f"TurboQuant-MSE {bits} bits", _TURBO, _specs(shape, spec, spec).spec, turbo, "formula", taken)
    for codec, clip in (("affine", 1.0), ("clipped", QUAROT_CLIP)):
        for bits in (2, 3, 4):
            spec = TensorSpec(codec=codec, bits=bits, grouping="per_token", group_size="head_dim", rotation="hadamard")
            name = f"Hadamard {bits} bits" + (f", ranges clipped to {clip:g}" if clip < 1 else "")
            theirs = _plain(partial(formulas.quarot, bits=bits, clip=clip))
            taken = dict.fromkeys(SIDES, bits + 32 / dim)
            yield Row(name, "QuaRot, arXiv 2404.00456", _specs(shape, spec, spec).spec, theirs, "formula", taken)


def _plain(formula: Callable[[Tensor], Tensor]) -> Quantiser:
    return lambda states, side: formula((states.key if side == "key" else states.value).double())


def clipped(shape: Fingerprint) -> Iterator[Row]:
    """Clip ranges by search."""
    for bits in (2, 3, 4):
        plan = Plan.uniform(shape, bits, bits, key_codec="clipped", value_codec="clipped")
        yield _grouped(f"clip search {bits} bits", "AWQ, arXiv 2306.00978", plan, formulas.awq_clipped)


def kvquant(shape: Fingerprint, model: PreTrainedModel, prompts: Tensor) -> Iterator[Row]:
    """Grids of both sides from the same prompts; theirs has one range a channel of keys, or a token of all heads."""
    caught = cache(partial(calibration_data, model, prompts))
    for bits in (2, 3, 4):
        for sparse in (0.0, SPARSE):
            key = TensorSpec(
                codec="nuq", bits=bits, grouping="per_channel", group_size=256, pre_rope=True, outliers=sparse
            )
            value = TensorSpec(codec="nuq", bits=bits, grouping="per_token", group_size="head_dim", outliers=sparse)
            plan = calibrate_codebooks(model, _specs(shape, key, value), prompts)
            name = f"KVQuant {bits} bits" + (f", {sparse:.0%} outliers" if sparse else "")
            kept = 32 * sparse  # a value in 16 bits and an index in 16
            taken: dict[Side, float] = {
                "key": bits + kept,
                "value": bits + 32 / (shape.num_kv_heads * shape.head_dim) + kept,
            }
            theirs = _kvquant(caught, bits, sparse)
            yield Row(name, "KVQuant, arXiv 2401.18079", plan.spec, theirs, "formula", taken)


Calibration = dict[tuple[int, Side], tuple[Tensor, Tensor]]
"""Channels of keys before RoPE ``[channels, tokens]``, or tokens of values ``[tokens, channels]``; and gradients."""


def _kvquant(caught: Callable[[], Calibration], bits: int, sparse: float) -> Quantiser:
    @cache
    def points(layer: int, side: Side) -> Tensor:
        return formulas.kvquant_points(*caught()[layer, side], bits, sparse)

    def theirs(states: States, side: Side) -> Tensor:
        x = (states.before if side == "key" else states.value).double()
        heads, tokens, dim = x.shape
        if side == "value":
            vectors = x.transpose(0, 1).reshape(tokens, heads * dim)
            ends = formulas.kvquant_range(vectors, sparse)
            decoded = formulas.kvquant(vectors, *ends, points(states.layer, side), sparse)
            return decoded.view(tokens, heads, dim).transpose(0, 1)
        vectors = x.transpose(1, 2).reshape(heads * dim, tokens)
        ends = formulas.kvquant_range(caught()[states.layer, side][0], sparse)
        decoded = formulas.kvquant(vectors, *ends, points(states.layer, side), sparse)
        return decoded.view(heads, dim, tokens).transpose(1, 2)

    return theirs


@torch.enable_grad()
def calibration_data(model: PreTrainedModel, prompts: Tensor) -> Calibration:
    """What the key and value projections of `LAYERS` give for prompts ``[prompts, tokens]``, with loss gradients."""
    kept: dict[tuple[int, Side], list[tuple[Tensor, Tensor]]] = {}
    for prompt in prompts:
        outputs, logits = _projected(model, prompt[None])
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), prompt[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for place, x, gradient in zip(outputs, outputs.values(), gradients, strict=True):
            kept.setdefault(place, []).append((x.detach()[0].double(), gradient[0].double()))
    joined = {place: [torch.cat(parts) for parts in zip(*found, strict=True)] for place, found in kept.items()}
    turned = {place: [x.T for x in both] if place[1] == "key" else both for place, both in joined.items()}
    return {place: (both[0].contiguous(), both[1].contiguous()) for place, both in turned.items()}


def _projected(model: PreTrainedModel, tokens: Tensor) -> tuple[dict[tuple[int, Side], Tensor], Tensor]:
    """Outputs of the key and value projections of `LAYERS`, ``[1, tokens, channels]``, and the logits."""
    outputs: dict[tuple[int, Side], Tensor] = {}
    hooks = []

    def keep(place: tuple[int, Side], _: Any, __: Any, output: Tensor) -> None:
        outputs[place] = output.requires_grad_(torch.is_grad_enabled())

    for layer in LAYERS:
        attention: Any = model.get_decoder().layers[layer].self_attn
        for side, projection in zip(SIDES, (attention.k_proj, attention.v_proj), strict=True):
            hooks.append(projection.register_forward_hook(partial(keep, (layer, side))))
    logits: Tensor = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return outputs, logits


@torch.no_grad()
def captured(model: PreTrainedModel, windows: Tensor) -> list[States]:
    """Keys and values of `LAYERS` in every window, the sinks left out."""
    from transformers import DynamicCache

    shape, found = Fingerprint.of(model), []
    for window in windows:
        outputs, _ = _projected(model, window[None])
        held = DynamicCache(config=model.config)
        model(window[None], past_key_values=held)
        for layer in LAYERS:
            before = outputs[layer, "key"][0].view(len(window), shape.num_kv_heads, -1).transpose(0, 1)
            cached: Any = held.layers[layer]
            found.append(States(layer, *(x[:, SINKS:].float() for x in (cached.keys[0], before, cached.values[0]))))
    return found


def block_errors(x: Tensor, decoded: Tensor) -> Tensor:
    """Relative errors of blocks of tokens of a head, float64 ``[heads * blocks]``."""
    off, own = ((it.double()).unflatten(-2, (-1, BLOCK)).flatten(-2).norm(dim=-1) for it in (decoded - x, x))
    return (off / own).flatten()


@torch.no_grad()
def measured(row: Row, every: Sequence[States]) -> dict[str, Any]:
    """A record: for each side both errors, their ratio, labels and bits."""
    record: dict[str, Any] = {"name": row.name, "source": row.source, "by": row.by}
    for side in row.bits:
        ours = torch.cat([block_errors(*_ours(row, states, side)) for states in every])
        theirs = torch.cat([block_errors(*_theirs(row, states, side)) for states in every])
        mean = partial(block_mean, tokens=torch.ones(len(ours)))
        spec = getattr(row.ours(LAYERS[0]), side)
        record[side] = {
            "label": spec.label,
            "bits": [_bits(row.ours(LAYERS[0]), side, every[0].key.shape[-1]), row.bits[side]],
            "ours": _digits(mean(ours)),
            "theirs": _digits(mean(theirs)),
            "ratio": _digits(mean(ours) / mean(theirs)),
        }
    return record


def _ours(row: Row, states: States, side: Side) -> tuple[Tensor, Tensor]:
    entry = row.ours(states.layer)
    x = states.of(side, getattr(entry, side))
    pair = [getattr(entry, it).format(x.shape[-1]) for it in SIDES]
    return x, as_stored(x, pair[SIDES.index(side)], page_tokens_of(*pair))


def _theirs(row: Row, states: States, side: Side) -> tuple[Tensor, Tensor]:
    x = states.of(side, getattr(row.ours(states.layer), side))
    return x, row.theirs(states, side)


def _bits(entry: LayerPlan, side: Side, dim: int) -> float:
    """Bits an element of a side of our pages."""
    pair = {it: getattr(entry, it).format(dim) for it in SIDES}
    tokens = page_tokens_of(*pair.values())
    return 8 * side_nbytes(pair[side], dim, tokens) / (tokens * dim)


def _digits(estimate: Estimate) -> dict[str, float]:
    return {name: float(f"{end:.5g}") for name, end in estimate.interval().as_dict().items()}


def rows(model: PreTrainedModel, prompts: Tensor) -> Iterator[Row]:
    """Every row, in the order of the table."""
    shape = Fingerprint.of(model)
    for make in (kivi, kvtuner, kvmix, hqq):
        yield from make(shape)
    yield from quanto(shape, model)
    yield from kvquant(shape, model, prompts)
    yield from rotated(shape)
    yield from clipped(shape)
    yield from packages(shape, model)


def measure() -> dict[str, Any]:
    """All rows on the packaged model."""
    model, tokenizer = load_model(MODEL_NAME, device="cpu", dtype="float32")
    prompts = token_windows(tokenizer, texts(CALIBRATION), PROMPT_TOKENS, PROMPTS, seed=0)
    every = captured(model, token_windows(tokenizer, texts(EVALUATION), SINKS + TOKENS, WINDOWS, seed=0))
    records = []
    for row in rows(model, prompts):
        records.append(measured(row, every))
        print(_line(records[-1]), flush=True)
    return {"model": model_name(model), "layers": LAYERS, "windows": WINDOWS, "tokens": TOKENS, "rows": records}


def kept_text(results: dict[str, Any]) -> str:
    """JSON with a row a line."""
    facts = json.dumps({name: value for name, value in results.items() if name != "rows"})
    lines = ",\n".join(json.dumps(record) for record in results["rows"])
    return f'{facts[:-1]}, "rows": [\n{lines}\n]}}\n'


def verdict(side: dict[str, Any]) -> str:
    """``better`` or equal; ``noise``: above theirs, but within the interval of their error; else ``worse``."""
    if side["ratio"]["value"] <= 1:
        return "better"
    return "noise" if side["ours"]["value"] <= side["theirs"]["high"] else "worse"


def table(results: dict[str, Any]) -> str:
    """The markdown table, and what must be known to read it."""
    lines = [
        "| method | source | beside | keys as | error | theirs | ratio [95 %] | bits: theirs "
        "| values as | error | theirs | ratio [95 %] | bits: theirs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(record) for record in results["rows"]),
    ]
    return "\n".join([*lines, "", _legend(results)])


def _line(record: dict[str, Any]) -> str:
    cells = [record["name"], record["source"], record["by"]]
    for side in SIDES:
        cells += _side_cells(record[side]) if side in record else 5 * [""]
    return f"| {' | '.join(cells)} |"


def _side_cells(side: dict[str, Any]) -> list[str]:
    ratio, (ours, theirs) = side["ratio"], side["bits"]
    said = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    return [
        f"`{side['label']}`",
        f"{side['ours']['value']:#.3g}",
        f"{side['theirs']['value']:#.3g}",
        f"**{said}**" if verdict(side) == "worse" else said,
        f"{ours:.2f}" + (f": {theirs:.2f}" if f"{ours:.2f}" != f"{theirs:.2f}" else ""),
    ]


def _legend(results: dict[str, Any]) -> str:
    verdicts = [verdict(record[side]) for record in results["rows"] for side in SIDES if side in record]
    counts = {name: verdicts.count(name) for name in ("better", "noise", "worse")}
    said = (
        f"{results['model']}, layers {', '.join(map(str, results['layers']))}, {results['windows']} windows of "
        f"{results['tokens']:,} tokens of real text after four sinks. Errors are relative, of blocks of {BLOCK} tokens "
        "of a head, their mean; ratios ours to theirs on the same blocks. Bits are those of codes, scales, zero points "
        f"and outliers, scales in 16 bits. Of {len(verdicts)} sides {counts['better']} are at most theirs, "
        f"{counts['noise']} above it and within the 95 % interval of their error, {counts['worse']} (bold) worse."
    )
    return fill(said, 120, break_on_hyphens=False)


def write_docs(kept: Path = KEPT, page: Path = PAGE) -> None:
    """Write the table of the kept results between the markers.

    Raises:
        DataError: there are no results, or no markers.
    """
    if not kept.exists():
        raise DataError(f"{kept} does not exist: run python -m benchmarks.authors.")
    insert(page, table(json.loads(kept.read_text(encoding="utf-8"))), BEGIN, END)


def main() -> None:
    """Measure, or write the table alone."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", action="store_true")
    asked = parser.parse_args()
    try:
        between(PAGE.read_text(encoding="utf-8"), BEGIN, END)
        if not asked.docs:
            KEPT.write_text(kept_text(measure()), encoding="utf-8")
        write_docs()
    except DataError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
