"""The plan: what each layer and head stores, validated, versioned, one JSON file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import model_validator

from kvloom.errors import PlanError
from kvloom.pages import PASSTHROUGH_BITS, Role, codec_facts
from kvloom.plan._bytes import head_layouts, itemsize, layer_nbytes, room_of
from kvloom.plan._fingerprint import Fingerprint
from kvloom.plan._shard import local_entry, local_tensors
from kvloom.plan._spec import Evict, GroupSize, HeadPlan, LayerPlan, PlanModel, TensorSpec, Window, format_layers
from kvloom.plan._tensors import PlanTensors, rotation_name
from kvloom.plan._validate import once, validated

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom.eviction import Room

Prefill = Literal["exact", "quantized"]


class Provenance(PlanModel):
    """Where a plan comes from: enough to make it again, and the solver's certificate.

    An imported plan has its ``source`` (a foreign format) and ``notes``: a sentence for everything that the source
    says or does otherwise. ``rotations`` names the prompts they were calibrated on.
    """

    source: str | None = None
    notes: tuple[str, ...] = ()
    signal: str | None = None
    solver: str | None = None
    budget: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    predicted_loss: float | None = None
    certificate: dict[str, Any] | None = None
    rotations: dict[str, Any] | None = None


class Plan(PlanModel):
    """What each full-attention layer of one model stores.

    Attributes:
        schema_version: Version of this schema.
        model: The model the plan is for; another is refused.
        layers: Entries that together cover every packed layer exactly once.
        prefill: ``exact``: the tokens of one forward pass attend to each other exactly, to earlier ones as stored.
            ``quantized``: every token attends to what decoding token by token would have shown it, so that results
            do not depend on how a prompt was cut.
        tensors: What calibration found and the layers' specs ask for: matrices ``layers.{layer}.{side}.rotation``,
            float16 ``[kv_heads, head_dim, head_dim]``.
        provenance: How the plan was made.
    """

    schema_version: Literal[1] = 1
    model: Fingerprint
    layers: tuple[LayerPlan, ...]
    prefill: Prefill = "exact"
    tensors: PlanTensors | None = None
    provenance: Provenance | None = None

    @model_validator(mode="after")
    def _covers_model(self) -> Plan:
        owners: dict[int, int] = {}
        for n, entry in enumerate(self.layers):
            for i in entry.indices:
                if i not in self.model.packed_layers:
                    raise ValueError(
                        f"layers[{n}].layers names layer {i}, which is not one of the model's full-attention layers "
                        f"{format_layers(list(self.model.packed_layers))}"
                    )
                if i in owners:
                    raise ValueError(f"layers[{n}].layers names layer {i}, already given by layers[{owners[i]}]")
                owners[i] = n
            for head in entry.heads:
                if not 0 <= head < self.model.num_kv_heads:
                    raise ValueError(
                        f"layers[{n}].heads names KV head {head}; the model has {self.model.num_kv_heads} (0-based)"
                    )
            try:
                head_layouts(entry, self.model.num_kv_heads, self.model.head_dim, 2)
            except PlanError as error:
                raise ValueError(f"layers[{n}]: {error}") from None
        missing = [i for i in self.model.packed_layers if i not in owners]
        if missing:
            raise ValueError(
                f"layers leaves out layer {format_layers(missing)}; every full-attention layer needs an entry"
            )
        return self

    @model_validator(mode="after")
    def _can_evict(self) -> Plan:
        for i, room in self._rooms.items():
            if room is None:
                continue
            if self.prefill != "exact":
                raise ValueError(
                    f"evict of layer {i} chooses among the tokens of a whole prompt, which read each other exactly: "
                    'set prefill to "exact"'
                )
            try:
                room.check()
            except PlanError as error:
                raise ValueError(f"layer {i}: {error}") from None
        return self

    @model_validator(mode="after")
    def _tensors_are_asked_for(self) -> Plan:
        if self._calibrated_sides and self.tensors is None:
            raise ValueError(
                "rotation is calibrated and the plan names no tensors: make them with kvloom calibrate --rotate"
            )
        if self.tensors is not None and not self._calibrated_sides:
            raise ValueError("tensors names a file that no layer asks for: remove it")
        return self

    @classmethod
    def uniform(
        cls,
        model: Any,
        key_bits: int = 4,
        value_bits: int = 2,
        *,
        key_group_size: GroupSize = 64,
        value_group_size: GroupSize = "head_dim",
        key_codec: str = "affine",
        value_codec: str = "affine",
        key_symmetric: bool = False,
        value_symmetric: bool = False,
        window: Window | None = None,
        prefill: Prefill = "exact",
    ) -> Plan:
        """The same specs in every layer: keys ``per_channel``, values ``per_token`` (KIVI, arXiv 2402.02750).

        Args:
            model: A transformers model or config, or a `Fingerprint`.
            key_bits: Bits of the keys.
            value_bits: Bits of the values.
            key_group_size: Tokens that share a key scale.
            value_group_size: Channels that share a value scale.
            key_codec: Number format of the keys.
            value_codec: Number format of the values.
            key_symmetric: Whether keys have no zero points.
            value_symmetric: Whether values have none.
            window: Exact tokens; none by default.
            prefill: See the class.

        Raises:
            PlanError: A width or group size is not one kvloom packs, or a codec is unknown or does not take it.
        """
        fingerprint = Fingerprint.of_any(model)
        key = _spec(key_bits, "per_channel", key_group_size, key_codec, key_symmetric)
        value = _spec(value_bits, "per_token", value_group_size, value_codec, value_symmetric)
        specs = dict.fromkeys(fingerprint.packed_layers, (key, value))
        return cls.from_specs(fingerprint, specs, window=window, prefill=prefill)

    @classmethod
    def from_specs(
        cls,
        model: Fingerprint,
        specs: Mapping[int, tuple[TensorSpec, TensorSpec]],
        *,
        window: Window | None = None,
        evict: Mapping[int, Evict | None] | None = None,
        prefill: Prefill = "exact",
        provenance: Provenance | None = None,
    ) -> Plan:
        """Plan from layer -> (key, value) specs; layers with equal specs share an entry.

        For other specs than `uniform` offers in every layer: ``dict.fromkeys(model.packed_layers, (key, value))``.
        Layers that ``evict`` does not name keep all tokens.
        """
        heads = {layer: [pair] * model.num_kv_heads for layer, pair in specs.items()}
        return cls.from_head_specs(model, heads, window=window, evict=evict, prefill=prefill, provenance=provenance)

    @classmethod
    def from_head_specs(
        cls,
        model: Fingerprint,
        specs: Mapping[int, Sequence[tuple[TensorSpec, TensorSpec]]],
        *,
        window: Window | None = None,
        evict: Mapping[int, Evict | None] | None = None,
        prefill: Prefill = "exact",
        provenance: Provenance | None = None,
    ) -> Plan:
        """Plan from layer -> (key, value) specs of each of its KV heads; layers with equal specs share an entry.

        A layer's own specs are its commonest pair, among equals that of the first head; other heads say what differs.
        Layers that ``evict`` does not name keep all tokens.

        Raises:
            PlanError: A layer has not one pair for each KV head of the model.
        """
        for layer, own in specs.items():
            if len(own) != model.num_kv_heads:
                raise PlanError(
                    f"specs of layer {layer} are of {len(own)} KV heads: give a pair for each of {model.num_kv_heads}."
                )
        groups: list[tuple[dict[str, Any], list[int]]] = []
        for layer in sorted(specs):
            stored = {"evict": (evict or {}).get(layer), **_base_and_heads(specs[layer])}
            same = next((layers for other, layers in groups if other == stored), None)
            if same is None:
                groups.append((stored, [layer]))
            else:
                same.append(layer)
        entries = [
            {"layers": format_layers(layers), "window": window or Window(), **stored} for stored, layers in groups
        ]
        return validated(
            cls,
            {"model": model, "layers": entries, "prefill": prefill, "provenance": provenance},
            "the plan",
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: The file is missing, is no JSON, or a field is wrong or given twice; the message names the field.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            data = json.loads(text, object_pairs_hook=partial(once, where=str(path)))
        except PlanError:
            raise
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} is not a JSON plan (cut short, or another kind of file): {error}.") from None
        plan = validated(cls, data, str(path))
        if plan.tensors:
            plan.tensors.locate(Path(path).parent)
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, fields at their defaults left out, and its tensors to a file beside it.

        Raises:
            PlanError: The tensors come from a file that is not there any more, or has changed.
        """
        path, plan = Path(path), self
        if self.tensors:
            plan = self.model_copy(update={"tensors": self.tensors.save(path)})
        path.write_text(plan.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """What `save` writes."""
        text = self.model_dump_json(exclude_defaults=True)
        data = {"schema_version": self.schema_version, **json.loads(text)}
        return json.dumps(data, indent=2) + "\n"

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Plan:
        """A copy with changed fields; pydantic would take along what was worked out of the old ones."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[name]
        return copy

    @cached_property
    def _by_layer(self) -> dict[int, LayerPlan]:
        return {i: entry for entry in self.layers for i in entry.indices}

    def spec(self, layer: int) -> LayerPlan:
        """The entry that covers ``layer``.

        Raises:
            PlanError: The plan does not cover it.
        """
        if layer not in self._by_layer:
            raise PlanError(f"the plan has no entry for layer {layer}; it covers {self.model.packed_layers}.")
        return self._by_layer[layer]

    @cached_property
    def codecs(self) -> tuple[str, ...]:
        """Names of the number formats that pages are packed in, sorted."""
        return tuple(sorted({spec.codec for spec in self._packed_specs}))

    @cached_property
    def pre_rope_layers(self) -> tuple[int, ...]:
        """Layers that pack keys of some head before their rotary embedding."""
        heads = range(self.model.num_kv_heads)
        return tuple(i for i in self.model.packed_layers if any(self.spec(i).head(h)[0].pre_rope for h in heads))

    @cached_property
    def _packed_specs(self) -> tuple[TensorSpec, ...]:
        """Specs of keys and of values of every layer and KV head, but for those of 16 bits."""
        heads = range(self.model.num_kv_heads)
        specs = (spec for entry in self.layers for head in heads for spec in entry.head(head))
        return tuple(spec for spec in specs if spec.bits != PASSTHROUGH_BITS)

    @cached_property
    def _decoded_first(self) -> list[str]:
        """What keeps attention from reading pages as they are."""
        reasons = [name for name in self.codecs if codec_facts(name).form == "opaque"]
        reasons += ["specs with outliers"] * any(spec.outliers for spec in self._packed_specs)
        return reasons + ["keys before RoPE"] * bool(self.pre_rope_layers)

    @property
    def needs_codebooks(self) -> bool:
        """Whether a codec takes calibrated codebooks, which the plan may have already."""
        return any(spec.is_calibrated for spec in self._packed_specs)

    def check_codebooks(self) -> None:
        """Raise PlanError, naming the field, if a codec's codebook has not been calibrated."""
        if self._missing_codebook:
            raise PlanError(self._missing_codebook)

    @cached_property
    def _missing_codebook(self) -> str:
        """What is to be said of the first codebook that is missing; empty if none is."""
        for entry in self.layers:
            for head in range(self.model.num_kv_heads):
                for side, spec in zip(("key", "value"), entry.head(head), strict=True):
                    if spec.is_calibrated and spec.codebook is None:
                        return (
                            f"layers {entry.layers}: {side}.codebook is missing, which codec {spec.codec!r} needs: run "
                            "`kvloom calibrate` on the plan."
                        )
        return ""

    @cached_property
    def _calibrated_sides(self) -> tuple[tuple[int, Role], ...]:
        """(layer, side) where the rotation of some KV head is calibrated."""
        return tuple(
            (layer, side)
            for layer in self.model.packed_layers
            for n, side in enumerate(get_args(Role))
            if any(self.spec(layer).head(h)[n].rotation == "calibrated" for h in range(self.model.num_kv_heads))
        )

    def rotations(self) -> dict[int, dict[Role, Tensor]]:
        """Matrices of the calibrated sides by layer: float16 ``[kv_heads, head_dim, head_dim]`` on the CPU.

        Raises:
            PlanError: The file of the plan's tensors is missing, is not the one the plan was saved with, or lacks one.
        """
        shape = (self.model.num_kv_heads, self.model.head_dim, self.model.head_dim)
        found: dict[int, dict[Role, Tensor]] = {}
        for layer, side in self._calibrated_sides:
            assert self.tensors is not None
            found.setdefault(layer, {})[side] = self.tensors.get(rotation_name(layer, side), shape)
        return found

    def shard(self, rank: int, world_size: int) -> Plan:
        """The part of one rank of a model whose KV heads are split evenly over ranks (tensor parallelism).

        Rank ``r`` holds KV heads ``[r * H / w, (r + 1) * H / w)``, with their specs and calibrated matrices; it counts
        them from 0. `nbytes` and `true_bits` of the part are of those heads. `LoomCache` takes the whole plan and calls
        this itself; the same part is returned at every call.

        Args:
            rank: Which, from 0.
            world_size: Number of ranks.

        Raises:
            ModelError: There is no such rank, or the heads cannot be split evenly.
            PlanError: Heads compete for a budget of tokens, pages of a rank alone would hold another number of tokens,
                or the plan's tensors cannot be read.
        """
        if (rank, world_size) == (0, 1):
            return self
        if (rank, world_size) not in self._parts:
            self._parts[rank, world_size] = self._shard(rank, world_size)
        return self._parts[rank, world_size]

    @cached_property
    def _parts(self) -> dict[tuple[int, int], Plan]:
        return {}

    def _shard(self, rank: int, world_size: int) -> Plan:
        heads = self.model.local_heads(rank, world_size)
        part = {
            "model": self.model.shard(rank, world_size),
            "layers": tuple(local_entry(entry, self.model, heads) for entry in self.layers),
            "tensors": None,
        }
        local = self.model_copy(update=part)
        sides, whole = local._calibrated_sides, self.rotations()
        if not sides:
            return local
        found = {layer: {side: whole[layer][side] for at, side in sides if at == layer} for layer, _ in sides}
        return local.model_copy(update={"tensors": local_tensors(found, heads)})

    def nbytes(self, batch: int, tokens: int, dtype: Any = None, *, decoded: int = 0) -> int:
        """Bytes of the packed layers' cache: codes, scales, zero points, exact window, sinks, unfilled page.

        Calibrated rotations count, once whatever the batch. Where tokens are evicted, those that are kept count, with
        their slots.

        Args:
            batch: Sequences.
            tokens: Tokens of each, padding included.
            dtype: Compute dtype (name or torch dtype) of what stays exact; None takes the model's.
            decoded: How many of the tokens came one by one after one prompt; it matters only to eviction.

        Returns:
            Bytes, equal to the live storage of a `LoomCache` filled to that length. Sliding-window and other stock
            layers are not the plan's and are not counted.
        """
        size = itemsize(dtype or self.model.dtype)
        heads, dim = self.model.num_kv_heads, self.model.head_dim
        total = 0
        for i in self.model.packed_layers:
            room = self.room(i)
            held = room.resident(tokens, decoded) if room else tokens
            total += layer_nbytes(self.spec(i), heads, dim, batch, held, size, room, tokens)
        return total

    def room(self, layer: int) -> Room | None:
        """How many tokens ``layer`` keeps; None for all of them."""
        return self._rooms[layer]

    @cached_property
    def _rooms(self) -> dict[int, Room | None]:
        model, count = self.model, len(self.model.packed_layers)
        return {
            i: room_of(self.spec(i), model.num_kv_heads, model.head_dim, (n, count))
            for n, i in enumerate(model.packed_layers)
        }

    @cached_property
    def needs_growing(self) -> str:
        """What of the plan only growing caches do, in words; empty if those of fixed size do everything."""
        if self.pre_rope_layers:
            return "keys before RoPE"
        watching = [room.policy.name for room in self._rooms.values() if room and room.policy.watches_steps]
        return f"steps that policy {watching[0]!r} watches" if watching else ""

    def true_bits(self, tokens: int, dtype: Any = None, *, decoded: int = 0) -> float:
        """8 x bytes / cached elements of one sequence of ``tokens``: everything resident counts; see `nbytes`."""
        if tokens <= 0:
            raise PlanError(f"true_bits needs at least one token, not {tokens}.")
        elements = 2 * len(self.model.packed_layers) * self.model.num_kv_heads * tokens * self.model.head_dim
        return 8 * self.nbytes(1, tokens, dtype, decoded=decoded) / elements

    @property
    def _reading(self) -> str:
        """How attention reads the pages, in words."""
        if opaque := self._decoded_first:
            return f"attention decodes the pages of {', '.join(opaque)} first: memory is saved, speed is not"
        return "attention reads the pages in place"

    def describe(self, tokens: int = 32768) -> str:
        """The plan in words: a line an entry, then bytes and true bits at ``tokens``."""
        model = self.model
        lines = [
            f"{model.architecture}: {len(model.packed_layers)} of {model.num_layers} layers packed, "
            f"{model.num_kv_heads} KV heads of {model.head_dim}, prefill {self.prefill}"
        ]
        for entry in self.layers:
            window = entry.window
            recent = f"{window.recent_ratio:g} of all" if window.recent_ratio else str(window.recent)
            heads = f", {len(entry.heads)} heads apart" if entry.heads else ""
            lines.append(
                f"  layers {entry.layers}: keys {entry.key.label}, values {entry.value.label}, "
                f"exact: {window.sinks} sinks, {recent} recent{heads}{_kept(entry)}"
            )
        if self.provenance:
            lines += [f"  {self.provenance.source}: {note}" for note in self.provenance.notes]
        lines.append(f"  {self._missing_codebook or self._reading}")
        lines.append(
            f"  {self.nbytes(1, tokens) / 2**20:.1f} MiB for one sequence of {tokens} tokens in {model.dtype}, "
            f"{self.true_bits(tokens):.2f} true bits (scales, zero points{', rotations' * bool(self.tensors)} and "
            "windows counted)"
        )
        return "\n".join(lines)


def plan_schema() -> dict[str, Any]:
    """JSON schema of a plan file."""
    schema = Plan.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "kvloom plan"
    return schema


def _kept(entry: LayerPlan) -> str:
    """Which tokens an entry keeps, in words; empty if all."""
    evict = entry.evict
    if evict is None:
        return ""
    share = isinstance(evict.budget, float)
    return f"; {evict.policy} keeps {f'{evict.budget:.2%}' if share else evict.budget} tokens"


def _base_and_heads(pairs: Sequence[tuple[TensorSpec, TensorSpec]]) -> dict[str, Any]:
    """Fields of an entry whose KV heads store these (key, value) specs."""
    [((key, value), _)] = Counter(pairs).most_common(1)
    heads = {
        head: HeadPlan(key=None if own[0] == key else own[0], value=None if own[1] == value else own[1])
        for head, own in enumerate(pairs)
        if own != (key, value)
    }
    return {"key": key, "value": value, "heads": heads}


def _spec(bits: int, grouping: str, group_size: GroupSize, codec: str, symmetric: bool) -> TensorSpec:
    fields = {"bits": bits, "grouping": grouping, "group_size": group_size, "codec": codec, "symmetric": symmetric}
    return validated(TensorSpec, fields, "the spec")
