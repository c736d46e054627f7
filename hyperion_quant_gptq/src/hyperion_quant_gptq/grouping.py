"""What a plan comes to for each layer of a model: bits, group size, bytes; and what does not fit. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from hyperion_core.errors import Problem
from hyperion_core.facts import BitPlan, ModelFacts, ModuleFact, is_output_head

#: Of each module: 16 leave it as it is.
BITS = frozenset({2, 3, 4, 8})
AS_IT_IS = 16
#: Weights that share a scale where the user does not say: the first of these that divides the widths of all layers, so
#: that they are alike, as transformers' own loader needs it; where none does, the first that divides the layer's.
DEFAULT_GROUP_SIZES = (128, 64, 32, 16)
#: Those that gptqmodel's kernels read; a whole row, however long, is one too, and is written as -1.
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
#: Those that torch's kernel for 4-bit weights takes on a CPU.
KERNEL_GROUP_SIZES = frozenset({32, 64, 128, 256})


@dataclass(frozen=True)
class Layout:
    """One quantized module: (out, in), bits, and the weights that share a scale; 0 where no group size fits."""

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """qweight, qzeros, scales in float16, and g_idx, an int32 for each input; without bias."""
        rows, columns = self.shape
        groups = columns // self.group_size if self.group_size else 1
        return rows * columns * self.bits // 8 + groups * rows * self.bits // 8 + 2 * groups * rows + 4 * columns


def layouts(model: ModelFacts, bits: BitPlan) -> list[Layout]:
    """Of what is to be quantized."""
    found = [(module, *bits.of(module.name)) for module in model.linear()]
    found = [each for each in found if each[1] != AS_IT_IS]
    common = default_group_size(*(module.shape[1] for module, _, group_size in found if not group_size))
    return [_layout(module, width, group_size or common) for module, width, group_size in found]


def default_group_size(*widths: int) -> int:
    """Weights that share a scale in layers of so many inputs; 0 where none of `DEFAULT_GROUP_SIZES` divides all."""
    return next((size for size in DEFAULT_GROUP_SIZES if not any(width % size for width in widths)), 0)


def multiple_of(bits: int) -> int:
    """Inputs and outputs are packed into words of 32 bits; 3 bits fill three words."""
    return 32 if bits == 3 else 32 // bits


def misfits(model: ModelFacts, bits: BitPlan) -> list[Problem]:
    """Layers that the plan's groups do not divide, or whose sizes do not fill words."""
    planned = layouts(model, bits)
    problems = []
    for size in sorted({each.group_size for each in planned if each.group_size}):
        own = [each for each in planned if each.group_size == size]
        if torn := [each for each in own if each.shape[1] % size]:
            what = f"groups of {size} do not divide the widths of {len(torn)} layers"
            problems.append(Problem("group_size", what, _some(torn), _fitting(own)))
        elif size not in GROUP_SIZES and any(each.shape[1] != size for each in own):
            what = f"gptqmodel and other readers of GPTQ have no groups of {size}"
            why = f"they have {', '.join(map(str, GROUP_SIZES))}, or a whole row"
            problems.append(Problem("group_size", what, why, _fitting(own)))
    for width in sorted({each.bits for each in planned}):
        unit = multiple_of(width)
        odd = [e for e in planned if e.bits == width and (e.shape[0] % unit or e.shape[1] % unit or not e.group_size)]
        if odd:
            what = f"{len(odd)} layers cannot be packed in {width} bits"
            why = f"inputs and outputs must be multiples of {unit}, and inputs of 16 too: " + _some(odd)
            fix = "leave them as they are: 16 bits for them in a bit plan; or take another method"
            problems.append(Problem("bits", what, why, fix))
    return problems


def tables(model: ModelFacts) -> list[tuple[int, int]]:
    """(rows, width) of the tokens' embedding and of the output head, unless that shares the embedding's weight."""
    positions = [m for m in model.modules if m.kind == "embedding" and m.shape[0] < model.vocab_size]
    found = [m for m in model.modules if m.kind == "embedding" or is_output_head(m.name)]
    return [(m.shape[0], m.shape[1]) for m in found if m not in positions]


def table_bytes(rows: int, width: int, bits: int) -> int:
    """Packed numbers, and scales in float16."""
    return rows * width * bits // 8 + 2 * rows * width // (default_group_size(width) or width)


def embedding_misfits(model: ModelFacts) -> list[Problem]:
    """Widths that no group size divides."""
    wrong = sorted({width for _, width in tables(model) if not default_group_size(width)})
    why = f"none of {', '.join(map(str, DEFAULT_GROUP_SIZES))} divides it"
    fix = "leave embedding_bits out"
    return [Problem("embedding_bits", f"embeddings {width} wide cannot be packed", why, fix) for width in wrong]


def _layout(module: ModuleFact, bits: int, group_size: int) -> Layout:
    rows, columns = module.shape
    return Layout(module.name, (rows, columns), bits, group_size or default_group_size(columns))


def _fitting(own: list[Layout]) -> str:
    sizes = [str(one) for one in DEFAULT_GROUP_SIZES if not any(each.shape[1] % one for each in own)]
    choose = f"take {' or '.join(sizes)}, which divide them all; or leave" if sizes else "leave"
    return f"{choose} group_size out: it is the largest of 128, 64, 32 and 16 that fits, then"


def _some(found: list[Layout]) -> str:
    first = "; ".join(f"{each.name} has {each.shape[1]} inputs and {each.shape[0]} outputs" for each in found[:3])
    return first + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
