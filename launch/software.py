"""What training software hides behind computing, and how it moves weights: stated once for each, never for a run.

Ours is what a plan is made with; the others are there to hold predictions against what was published of them.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Software:
    """What an engine hides behind computing, and how it moves weights."""

    name: str
    gathers_per_layer: int  # collectives for a layer's weights under ZeRO-3
    overlaps_gathers: bool  # ZeRO-3's, with the layers before
    overlaps_gradients: bool  # of ZeRO 0 and 1, with the last micro-batch's backward pass
    hides_transfers: bool  # between stages, wherever a schedule leaves room
    scatters_transfers: bool  # each tensor rank sends its share alone, even without sequence parallelism
    copies_pieces: bool = False  # ZeRO-3's collectives copy each rank's piece by a kernel of its own
    regathers: bool = True  # ZeRO-3 gathers once more where a layer is computed again
    attention_rate: float = 1.0  # of its fused attention, over the device's `attention_share`
    hidden_tensor_share: float = (
        0.0  # of the tensor group's collectives, behind the products before and after them
    )


# DeepSpeed fetches module by module: four matrices of a block, since small parameters stay; each forward hook fetches,
# that of a recomputation too.
OURS = Software("Megaloom", 4, True, False, True, False)
# Narayanan et al. 2021, section 4.1 for scattered messages; nothing overlaps (Korthikanti et al. 2022, section 6).
MEGATRON_2021 = Software("Megatron-LM 2021", 4, False, False, False, True)
MEGATRON_CORE = Software("Megatron Core", 4, True, True, True, True)
# With --tp-comm-overlap; products are cut into as many pieces as there are ranks, mostly 4 or 8: one is not hidden.
MEGATRON_OVERLAPPED = replace(MEGATRON_CORE, name="Megatron Core overlapped", hidden_tensor_share=0.75)
# As it was in 2021: ZeRO-3 gathered each of a block's 12 tensors by itself, into a list of tensors, and hid nothing;
# nor did its pipeline.
DEEPSPEED_2021 = Software("DeepSpeed 2021", 12, False, False, False, False, copies_pieces=True)
FSDP = Software("PyTorch FSDP", 1, True, True, True, False, regathers=False)  # a block is one flat parameter
# FlashAttention in Triton; FlashAttention 2 is 1.3 to 1.5 times as fast in forward passes and twice in backward passes
# (Dao 2023, arXiv:2307.08691, section 4.1).
FSDP_TRITON = replace(FSDP, name="PyTorch FSDP, Triton attention", attention_rate=0.6)
