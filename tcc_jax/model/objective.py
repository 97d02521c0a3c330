"""What the decoder learns: the genes still to come at a prefix of a set, or the next gene in its order.

Both losses are a cross-entropy -sum_v p_v log softmax(logits)_v, whose target p enters only through its mean embedding
and mean bias, so that no [positions, vocabulary] target exists, and whose logits can live one chunk at a time.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tcc_jax.model.attention import MASKED
from tcc_jax.model.decoder import END, NUM_SPECIAL, Decoder
from tcc_jax.model.products import contract, in_row_order, rounded, sum_of_outer


class Beyond(NamedTuple):
    """The genes of each segment's set that have no place in the row: they are to come at each of its positions.

    Attributes:
        genes_BMR: int32 ids of all of them or of a random sample, then 0.
        counts_BM: int32, how many there are in all.
    """

    genes_BMR: jax.Array
    counts_BM: jax.Array


def remaining_set_loss(
    decoder: Decoder,
    h_BCD: jax.Array,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BC: jax.Array | None = None,
    weights_BC: jax.Array | None = None,
    replaced_BT: jax.Array | None = None,
    tile: int = 0,
    beyond: Beyond | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy against the uniform distribution over the genes still to come in the segment, <end> when none are.

    Under a random order of the genes this is the expectation of the next-gene loss over the orders of what remains.

    Args:
        decoder: gives the tied embedding and the output bias.
        h_BCD: float32 final hidden states at the positions to score, as returned by the decoder.
        tokens_BT: int32 ids, 0 for padding.
        segments_BT: int32, 0 for padding, else the segment's number.
        positions_BC: int32, the positions to score; None scores every position that has a target.
        weights_BC: float32, 1 to score a position and 0 to leave it out; given with `positions_BC`.
        replaced_BT: bool, genes of `tokens_BT` that the decoder was not shown: they are to come wherever they stand.
        tile: positions, over all rows, whose logits are held at once; 0 holds them all.
        beyond: the part of each set that its segment leaves out. A sample stands for all of it, which leaves the loss
            unbiased: it is linear in the target.

    Returns:
        The sum of the losses in nats and the number of scored positions, float32 both. A position without a target
        (padding, <end>, the last gene of a set cut off without <end>) is never scored.
    """
    positions_BC, weights_BC = _scored(segments_BT, positions_BC, weights_BC, beyond)
    position_BC1 = positions_BC[:, :, None]
    index_T = jnp.arange(tokens_BT.shape[1])
    segments_BC = jnp.take_along_axis(segments_BT, positions_BC, axis=1)
    same_BCT = segments_BC[:, :, None] == segments_BT[:, None, :]
    unseen_BCT = index_T > position_BC1
    if replaced_BT is not None:
        unseen_BCT = unseen_BCT | replaced_BT[:, None, :]
    to_come_BCT = same_BCT & unseen_BCT & (tokens_BT >= NUM_SPECIAL)[:, None, :]
    count_BC = jnp.sum(to_come_BCT, axis=-1)
    if beyond:
        slots_BC = jnp.maximum(segments_BC - 1, 0)
        count_BC = count_BC + jnp.take_along_axis(beyond.counts_BM, slots_BC, axis=1)
    # Nothing to come: the next token is <end>, and it is the whole target.
    target_BCT = to_come_BCT | ((count_BC[:, :, None] == 0) & (index_T == position_BC1 + 1))
    # A product with the block mask: unlike differences of running sums along the row it loses no bits, and at
    # T / V of the cost of the output layer it is not worth a segmented scan. Operands as in the logits, so that the
    # embedding rounds alike on both sides of the loss.
    dtype = jnp.dtype(decoder.config.matmul_dtype)
    count_BC = jnp.maximum(count_BC, 1)
    embedding_BTD = decoder.embedding[tokens_BT]
    embedding_BCD = _sum_targets(target_BCT.astype(dtype), embedding_BTD)
    # The bias is added to the logits in float32.
    bias_BC = jnp.einsum(
        "BCT,BT->BC",
        target_BCT.astype(jnp.float32),
        decoder.output_bias[tokens_BT],
        precision=jax.lax.Precision.HIGHEST,
    )
    if beyond:
        beyond_BMD, beyond_BM = _sum_beyond(decoder, beyond)
        embedding_BCD = embedding_BCD + jnp.take_along_axis(beyond_BMD, slots_BC[:, :, None], axis=1)
        bias_BC = bias_BC + jnp.take_along_axis(beyond_BM, slots_BC, axis=1)
    embedding_BCD, bias_BC = embedding_BCD / count_BC[:, :, None], bias_BC / count_BC
    return _cross_entropy(decoder, h_BCD, embedding_BCD, bias_BC, weights_BC, tile)


def next_gene_loss(
    decoder: Decoder,
    h_BCD: jax.Array,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BC: jax.Array | None = None,
    weights_BC: jax.Array | None = None,
    replaced_BT: jax.Array | None = None,
    tile: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy against the next token of the segment: the next gene, or <end> after the last.

    Arguments and results are those of `remaining_set_loss`; `replaced_BT` does not change the target.
    """
    positions_BC, weights_BC = _scored(segments_BT, positions_BC, weights_BC)
    next_BC = jnp.minimum(positions_BC + 1, tokens_BT.shape[1] - 1)
    target_BC = jnp.take_along_axis(tokens_BT, next_BC, axis=1)
    bias_BC = decoder.output_bias[target_BC]
    return _cross_entropy(decoder, h_BCD, decoder.embedding[target_BC], bias_BC, weights_BC, tile)


def with_false_genes(
    key: jax.Array, tokens_BT: jax.Array, segments_BT: jax.Array, largest_share: float, vocabulary_size: int
) -> tuple[jax.Array, jax.Array]:
    """Replace some genes of each segment by genes drawn at random from the whole vocabulary.

    Each segment draws its share uniformly between 0 and `largest_share`, and each of its genes is replaced with that
    probability.

    Returns:
        The tokens to show, BT int32, and which of them were replaced, BT bool.
    """
    share_key, choice_key, gene_key = jax.random.split(key, 3)
    # One number for each place a segment could have: no row holds more segments than tokens.
    share_BT = largest_share * jax.random.uniform(share_key, tokens_BT.shape)
    share_BT = jnp.take_along_axis(share_BT, jnp.minimum(segments_BT, tokens_BT.shape[1] - 1), axis=1)
    replaced_BT = (jax.random.uniform(choice_key, tokens_BT.shape) < share_BT) & (tokens_BT >= NUM_SPECIAL)
    genes_BT = jax.random.randint(gene_key, tokens_BT.shape, NUM_SPECIAL, vocabulary_size)
    return jnp.where(replaced_BT, genes_BT, tokens_BT), replaced_BT


LOSSES = {"remaining-set": remaining_set_loss, "next-gene": next_gene_loss}


def cut_positions(
    key: jax.Array,
    tokens_BT: jax.Array,
    starts_BM: jax.Array,
    gene_counts_BM: jax.Array,
    num_cuts: int,
    low: float,
    high: float,
    set_sizes_BM: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draw the positions to score: in each segment, K prefixes of c visible genes.

    c is uniform over the whole numbers with low <= c / genes <= high, or the nearest one where a short set has none,
    and at most the genes that the segment holds.
    The K draws of a segment are stratified: the range is cut into K parts and each part gives one.
    All n genes are a prefix only if `high` is 1 and the segment has its <end>, which is then the target.

    Args:
        key: a JAX key.
        tokens_BT: int32 ids.
        starts_BM: int32, column of each segment's <start>; 0 in unused slots.
        gene_counts_BM: int32, genes in each segment; 0 in unused slots.
        num_cuts: K, cut points in a segment.
        low: smallest share of a set's genes that is visible, 0 to 1.
        high: largest share.
        set_sizes_BM: int32, genes in the whole sets, of which the segments hold a part; else the segments are whole.

    Returns:
        Columns [B, M, K] int32 and weights [B, M, K] float32: 1, or 0 in unused slots.
    """
    if set_sizes_BM is None:
        set_sizes_BM = gene_counts_BM
    last_B = tokens_BT.shape[1] - 1
    after_BM = jnp.minimum(starts_BM + gene_counts_BM + 1, last_B)
    has_end_BM = jnp.take_along_axis(tokens_BT, after_BM, axis=1) == END
    # Something must be left to find: a gene of the segment, one beyond it, or <end>.
    more_BM = (set_sizes_BM > gene_counts_BM) | (has_end_BM if high >= 1 else False)
    most_BM = gene_counts_BM - 1 + more_BM
    # A little slack: in float32, 0.2 * 5 lies above 1.
    slack = 1e-4
    first_BM = jnp.clip(jnp.ceil(low * set_sizes_BM - slack).astype(jnp.int32), 0, jnp.maximum(most_BM, 0))
    last_BM = jnp.clip(jnp.floor(high * set_sizes_BM + slack).astype(jnp.int32), first_BM, jnp.maximum(most_BM, 0))
    uniform_BMK = jax.random.uniform(key, (*starts_BM.shape, num_cuts))
    share_BMK = (jnp.arange(num_cuts) + uniform_BMK) / num_cuts
    width_BM1 = (last_BM - first_BM + 1)[:, :, None]
    # Rounding can lift the largest share to 1.
    step_BMK = jnp.minimum((share_BMK * width_BM1).astype(jnp.int32), width_BM1 - 1)
    weights_BMK = jnp.broadcast_to((gene_counts_BM > 0)[:, :, None], uniform_BMK.shape).astype(jnp.float32)
    return starts_BM[:, :, None] + first_BM[:, :, None] + step_BMK, weights_BMK


def _scored(
    segments_BT: jax.Array,
    positions_BC: jax.Array | None,
    weights_BC: jax.Array | None,
    beyond: Beyond | None = None,
) -> tuple[jax.Array, jax.Array]:
    # A position has a target if the next column continues its segment (that is a gene, or <end>), or genes lie beyond.
    following_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    has_target_BT = (segments_BT > 0) & (following_BT == segments_BT)
    if beyond:
        slots_BT = jnp.maximum(segments_BT - 1, 0)
        has_target_BT |= (segments_BT > 0) & (jnp.take_along_axis(beyond.counts_BM, slots_BT, axis=1) > 0)
    if positions_BC is None or weights_BC is None:
        positions_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
        return positions_BT, has_target_BT.astype(jnp.float32)
    return positions_BC, weights_BC * jnp.take_along_axis(has_target_BT, positions_BC, axis=1)


def _sum_beyond(decoder: Decoder, beyond: Beyond) -> tuple[jax.Array, jax.Array]:
    """Return the sums, BMD and BM, of the embeddings and biases of the genes beyond each segment."""
    known_BMR = beyond.genes_BMR >= NUM_SPECIAL
    scale_BM = beyond.counts_BM / jnp.maximum(jnp.sum(known_BMR, axis=-1), 1)
    weights_BMR = known_BMR * scale_BM[:, :, None]
    operand_VD = decoder.embedding[...].astype(decoder.config.matmul_dtype)
    embedding_BMD = contract("BMR,BMRD->BMD", weights_BMR, operand_VD[beyond.genes_BMR].astype(jnp.float32))
    return embedding_BMD, jnp.sum(weights_BMR * decoder.output_bias[beyond.genes_BMR], axis=-1)


@jax.custom_vjp
def _sum_targets(target_BCT: jax.Array, embedding_BTD: jax.Array) -> jax.Array:
    return contract("BCT,BTD->BCD", target_BCT, embedding_BTD.astype(target_BCT.dtype))


def _sum_targets_backward(target_BCT: jax.Array, d_BCD: jax.Array) -> tuple[None, jax.Array]:
    target_BTC = in_row_order(jnp.swapaxes(target_BCT, 1, 2))
    return None, contract("BTC,BCD->BTD", target_BTC, d_BCD.astype(target_BCT.dtype))


_sum_targets.defvjp(lambda target, embedding: (_sum_targets(target, embedding), target), _sum_targets_backward)


def _cross_entropy(
    decoder: Decoder,
    h_BCD: jax.Array,
    embedding_BCD: jax.Array,
    bias_BC: jax.Array,
    weights_BC: jax.Array,
    tile: int,
) -> tuple[jax.Array, jax.Array]:
    target_logit_BC = jnp.sum(h_BCD * embedding_BCD, axis=-1) + bias_BC
    normalizers = weighted_logsumexp(
        h_BCD, decoder.embedding[...], decoder.masked_bias(), weights_BC, decoder.config.matmul_dtype, tile
    )
    return normalizers - jnp.sum(weights_BC * target_logit_BC), jnp.sum(weights_BC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_logsumexp(
    h_BCD: jax.Array, embedding_VD: jax.Array, bias_V: jax.Array, weights_BC: jax.Array, dtype: str, tile: int = 0
) -> jax.Array:
    """Return sum_bc w_bc logsumexp_v(h_bc . e_v + b_v), float32.

    The sum is a single number, so its gradient is known up to one factor while the logits are at hand: it is taken
    there and then, and the logits are dropped (the fused linear cross-entropy of Liger Kernel, Hsu et al. 2024). Three
    products with the embedding in all, none of them repeated.

    Args:
        h_BCD: float32 hidden states at the scored positions.
        embedding_VD: float32 tied embedding.
        bias_V: float32 output bias, very low where an id can never be proposed.
        weights_BC: float32 weight of each position.
        dtype: type of the products' operands and, except on a CPU, of the logits in memory; sums and exponentials are
            float32.
        tile: positions, over all rows, whose logits are held at once; 0 holds them all.
    """
    return _logsumexp(h_BCD, embedding_VD, bias_V, weights_BC, dtype, tile, with_gradients=False)[0]


def _weighted_logsumexp_forward(
    h_BCD: jax.Array, embedding_VD: jax.Array, bias_V: jax.Array, weights_BC: jax.Array, dtype: str, tile: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _logsumexp(h_BCD, embedding_VD, bias_V, weights_BC, dtype, tile, with_gradients=True)


def _weighted_logsumexp_backward(dtype: str, tile: int, gradients: tuple[jax.Array, ...], factor: jax.Array) -> tuple:
    return tuple(factor * gradient for gradient in gradients)


weighted_logsumexp.defvjp(_weighted_logsumexp_forward, _weighted_logsumexp_backward)


def _logsumexp(
    h_BCD: jax.Array,
    embedding_VD: jax.Array,
    bias_V: jax.Array,
    weights_BC: jax.Array,
    dtype: str,
    tile: int,
    *,
    with_gradients: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    num_rows, num_positions = weights_BC.shape
    num_chunks = math.ceil(num_positions / max(1, tile // num_rows)) if tile else 1
    kind = jnp.dtype(dtype)
    # An id that can never be proposed takes the embedding of a gene: its product must not raise the bound below.
    operand_VD = jnp.where(bias_V[:, None] > MASKED / 2, embedding_VD, embedding_VD[jnp.argmax(bias_V)]).astype(kind)
    largest_bias = jnp.max(bias_V)

    def chunk(carry: tuple[jax.Array, ...], inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        # P: the positions of the chunk over all rows, as one axis.
        shape = inputs[0].shape
        h_PD, weights_P = inputs[0].reshape(-1, shape[-1]), inputs[1].reshape(-1)
        product_PV = _product(h_PD.astype(kind), operand_VD)
        # The exponentials need a bound that is near the largest logit, not the very largest: the largest product and
        # bias make one without a pass over their sums. It is off by no more than the biases differ, far below the 87
        # nats where a float32 exponential ends.
        bound_P = jnp.max(product_PV, axis=-1) + largest_bias
        exp_PV = jnp.exp(product_PV + bias_V - bound_P[:, None])
        sum_P = jnp.sum(exp_PV, axis=-1)
        logsumexp_P = bound_P + jnp.log(sum_P)
        total = carry[0] + jnp.sum(weights_P * logsumexp_P)
        if not with_gradients:
            return (total,), None
        # exp / sum is the softmax; dividing the small side of each product saves a pass over the logits.
        scale_P = weights_P / sum_P
        operand_PV = rounded(exp_PV, kind)
        d_h_PD = contract("PV,VD->PD", operand_PV, operand_VD) * scale_P[:, None]
        sums_DV, sums_V = _sums_over_positions((h_PD * scale_P[:, None]).astype(kind), scale_P.astype(kind), operand_PV)
        return (total, carry[1] + sums_DV, carry[2] + sums_V), (d_h_PD.reshape(shape), logsumexp_P.reshape(shape[:-1]))

    carry: tuple[jax.Array, ...] = (jnp.zeros((), jnp.float32),)
    if with_gradients:
        # The gradient of the embedding is summed up turned, as the products give it.
        carry = (*carry, jnp.zeros(embedding_VD.shape[::-1], jnp.float32), jnp.zeros_like(bias_V))
    inputs = (_into_chunks(h_BCD, num_chunks), _into_chunks(weights_BC, num_chunks))
    carry, by_chunk = jax.lax.scan(chunk, carry, inputs)
    if not with_gradients:
        return carry[0], ()
    d_h_BCD, logsumexp_BC = (_out_of_chunks(array, num_positions) for array in by_chunk)
    return carry[0], (d_h_BCD, carry[1].T, carry[2], logsumexp_BC)


def _product(h_PD: jax.Array, operand_VD: jax.Array) -> jax.Array:
    """Return the product PV float32."""
    # An accelerator moves half as much if they lie in memory in the type of the run. On a CPU a chunk stays in the
    # caches, and rounding is one more pass.
    return jax.lax.platform_dependent(
        h_PD,
        operand_VD,
        cpu=functools.partial(contract, "PD,VD->PV"),
        default=lambda h_PD, operand_VD: contract("PD,VD->PV", h_PD, operand_VD, h_PD.dtype).astype(jnp.float32),
    )


def _sums_over_positions(
    scaled_PD: jax.Array, scale_P: jax.Array, operand_PV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the products DV and V, float32, over the positions: the gradients of the embedding, turned, and bias."""

    def in_one(scaled_PD: jax.Array, scale_P: jax.Array, operand_PV: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Alone, the bias takes a CPU a fifth of the time of the embedding; as one more row of it, next to nothing.
        sums_EV = sum_of_outer(jnp.concatenate([scaled_PD, scale_P[:, None]], axis=1), operand_PV)
        return sums_EV[:-1], sums_EV[-1]

    def in_two(scaled_PD: jax.Array, scale_P: jax.Array, operand_PV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sum_of_outer(scaled_PD, operand_PV), contract("P,PV->V", scale_P, operand_PV)

    return jax.lax.platform_dependent(scaled_PD, scale_P, operand_PV, cpu=in_one, default=in_two)


def _into_chunks(x_BC: jax.Array, num_chunks: int) -> jax.Array:
    # Chunks cut the positions and not the rows: rows lie on different devices.
    padding = -x_BC.shape[1] % num_chunks
    x_BC = jnp.pad(x_BC, [(0, 0), (0, padding)] + [(0, 0)] * (x_BC.ndim - 2))
    chunked = x_BC.reshape(x_BC.shape[0], num_chunks, -1, *x_BC.shape[2:])
    return jnp.moveaxis(chunked, 1, 0)


def _out_of_chunks(x_NBC: jax.Array, num_positions: int) -> jax.Array:
    x_BNC = jnp.moveaxis(x_NBC, 0, 1)
    return x_BNC.reshape(x_BNC.shape[0], -1, *x_BNC.shape[3:])[:, :num_positions]
