"""Whether the head and its loss work in chunks of tokens, and in which: facts, without torch (see chunked_loss.py).

A chunk must not be too small either.  The sum of the weight's gradient is read and written once a chunk: 8 bytes for
each weight, against 2 FLOPs for each weight and token, so that a chunk of t tokens has t / 4 FLOPs a byte.  An H100 or
H200 does 200 to 300 FLOPs in the time of a byte (launch/hardware.py): with 2048 tokens the products take the time, not
the sums.
"""

from typing import Literal

from model_providers.config import ModelConfig

ChunkTokens = int | Literal["auto", "all"]

AUTO_CHUNK_TOKENS = 2048
MANY_BYTES = 2 * 2**30  # of a micro-batch's logits in fp32: below this, whole logits are the faster way


def chunk_tokens(wanted: ChunkTokens, model: ModelConfig, *, num_tokens: int, tp: int) -> int | None:
    """Tokens of a chunk, for a micro-batch of so many; None: the logits are made whole."""
    if wanted == "all" or model.electra is not None:
        return None
    if wanted != "auto":
        return wanted
    is_much = logits_bytes(model, num_tokens=num_tokens, tp=tp) > MANY_BYTES
    return AUTO_CHUNK_TOKENS if is_much and num_tokens > AUTO_CHUNK_TOKENS else None


def logits_bytes(model: ModelConfig, *, num_tokens: int, tp: int) -> float:
    """Of one micro-batch on one rank, in fp32."""
    return 4.0 * num_tokens * model.padded_vocab_size / tp


def tokens_of_a_chunk(wanted: int, num_tokens: int) -> int:
    """Chunks are cut nearly even, so that none is a remainder of a few."""
    num_chunks = max(1, -(-num_tokens // wanted))
    return -(-num_tokens // num_chunks)
