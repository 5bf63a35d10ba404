"""The arithmetic of `group_norm_silu` in Triton: two passes over memory each way, and between them one over sums.

A program takes a span of places of a few channels, in tiles, whichever of the two lies side by side in memory. Sums of
a span have one owner, and those of a group are added in order: no atomics, so the same bits each time.
"""

from __future__ import annotations

from ._triton import jit, tl


@jit
def _position(channels, places, CHANNELS: tl.constexpr, PLACES: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's sample, its channels (CHANNELS, 1), its span, the number of spans and its first place."""
    spans = tl.cdiv(places, PLACES * STEPS)
    tiles = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    span = program % spans
    # 64 bits: a tensor may exceed 2^31 elements.
    sample = (program // spans // tiles).to(tl.int64)
    channel = program // spans % tiles * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    return sample, channel, span, spans, span.to(tl.int64) * (PLACES * STEPS)


@jit
def _at(sample, channel, place, channels, places, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the addresses of a tile in a tensor (B, C, N), or where channels are last, (B, N, C)."""
    if LAST:
        return (sample * places + place) * channels + channel
    return (sample * channels + channel) * places + place


@jit
def _of_group(pointer, sample, channel, channels, groups):  # type: ignore[no-untyped-def]
    """Load what the groups of these channels have (B, G)."""
    return tl.load(pointer + sample * groups + channel // (channels // groups), mask=channel < channels, other=0.0)


@jit
def _of_channel(pointer, channel, channels, GIVEN: tl.constexpr, other):  # type: ignore[no-untyped-def]
    """Load what these channels have (C,), or where it is not given, return `other`."""
    if GIVEN:
        return tl.load(pointer + channel, mask=channel < channels, other=0.0)
    return tl.full(channel.shape, other, tl.float32)


@jit
def _silu_gradient(y):  # type: ignore[no-untyped-def]
    sigmoid = tl.sigmoid(y)
    return sigmoid * (1.0 + y * (1.0 - sigmoid))


@jit
def moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    mean_ptr,
    squares_ptr,
    channels,
    places,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
    STEPS: tl.constexpr,
    LAST: tl.constexpr,
):
    sample, channel, span, spans, first = _position(channels, places, CHANNELS, PLACES, STEPS)
    # Welford's sums for each element of the tile, so that a large mean costs no digits.
    count = tl.zeros([1, PLACES], dtype=tl.float32)
    mean = tl.zeros([CHANNELS, PLACES], dtype=tl.float32)
    squares = tl.zeros([CHANNELS, PLACES], dtype=tl.float32)
    for step in range(STEPS):
        place = first + step * PLACES + tl.arange(0, PLACES)[None, :]
        inside = (channel < channels) & (place < places)
        x = tl.load(x_ptr + _at(sample, channel, place, channels, places, LAST), mask=inside, other=0.0).to(tl.float32)
        count += tl.where(place < places, 1.0, 0.0)
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        squares += delta * tl.where(inside, x - mean, 0.0)
    total = tl.sum(count, axis=1, keep_dims=True)
    mean_of_span = tl.sum(mean * count, axis=1, keep_dims=True) / total
    apart = mean - mean_of_span
    squares_of_span = tl.sum(squares + count * apart * apart, axis=1, keep_dims=True)
    at = (sample * spans + span) * channels + channel
    tl.store(mean_ptr + at, mean_of_span, mask=channel < channels)
    tl.store(squares_ptr + at, squares_of_span, mask=channel < channels)


@jit
def group_moments_kernel(  # type: ignore[no-untyped-def]
    partial_mean_ptr,
    partial_squares_ptr,
    mean_ptr,
    rstd_ptr,
    channels,
    places,
    groups,
    spans,
    eps,
    SPAN: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPANS: tl.constexpr,
):
    program = tl.program_id(0)
    of_group = channels // groups
    within = tl.arange(0, CHANNELS)[None, :]
    at = (program // groups).to(tl.int64) * spans * channels + program % groups * of_group + within
    size = (of_group * places).to(tl.float32)
    total = tl.zeros([SPANS, CHANNELS], dtype=tl.float32)
    for start in range(0, spans, SPANS):
        span = start + tl.arange(0, SPANS)[:, None]
        inside = (span < spans) & (within < of_group)
        count = tl.minimum(places - span * SPAN, SPAN).to(tl.float32)
        total += tl.load(partial_mean_ptr + at + span * channels, mask=inside, other=0.0) * (count / size)
    mean = tl.sum(total)
    total = tl.zeros([SPANS, CHANNELS], dtype=tl.float32)
    for start in range(0, spans, SPANS):
        span = start + tl.arange(0, SPANS)[:, None]
        inside = (span < spans) & (within < of_group)
        count = tl.minimum(places - span * SPAN, SPAN).to(tl.float32)
        apart = tl.load(partial_mean_ptr + at + span * channels, mask=inside, other=0.0) - mean
        squares = tl.load(partial_squares_ptr + at + span * channels, mask=inside, other=0.0)
        total += tl.where(inside, squares + count * apart * apart, 0.0)
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, 1.0 / tl.sqrt(tl.sum(total) / size + eps))


@jit
def silu_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    channels,
    places,
    groups,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
    STEPS: tl.constexpr,
    LAST: tl.constexpr,
):
    sample, channel, _, _, first = _position(channels, places, CHANNELS, PLACES, STEPS)
    mean = _of_group(mean_ptr, sample, channel, channels, groups)
    factor = _of_group(rstd_ptr, sample, channel, channels, groups) * _of_channel(
        weight_ptr, channel, channels, WEIGHT, 1.0
    )
    bias = _of_channel(bias_ptr, channel, channels, BIAS, 0.0)
    for step in range(STEPS):
        place = first + step * PLACES + tl.arange(0, PLACES)[None, :]
        inside = (channel < channels) & (place < places)
        at = _at(sample, channel, place, channels, places, LAST)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * factor + bias
        tl.store(out_ptr + at, (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def gradient_sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    product_ptr,
    channels,
    places,
    groups,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
    STEPS: tl.constexpr,
    LAST: tl.constexpr,
):
    sample, channel, span, spans, first = _position(channels, places, CHANNELS, PLACES, STEPS)
    mean = _of_group(mean_ptr, sample, channel, channels, groups)
    rstd = _of_group(rstd_ptr, sample, channel, channels, groups)
    weight = _of_channel(weight_ptr, channel, channels, WEIGHT, 1.0)
    bias = _of_channel(bias_ptr, channel, channels, BIAS, 0.0)
    total = tl.zeros([CHANNELS, PLACES], dtype=tl.float32)
    product = tl.zeros([CHANNELS, PLACES], dtype=tl.float32)
    for step in range(STEPS):
        place = first + step * PLACES + tl.arange(0, PLACES)[None, :]
        inside = (channel < channels) & (place < places)
        at = _at(sample, channel, place, channels, places, LAST)
        normed = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * _silu_gradient(normed * weight + bias)
        # Masked lanes have a gradient of zero and add nothing.
        total += grad
        product += grad * normed
    at_span = (sample * spans + span) * channels + channel
    tl.store(sum_ptr + at_span, tl.sum(total, axis=1, keep_dims=True), mask=channel < channels)
    tl.store(product_ptr + at_span, tl.sum(product, axis=1, keep_dims=True), mask=channel < channels)


@jit
def group_gradients_kernel(  # type: ignore[no-untyped-def]
    partial_sum_ptr,
    partial_product_ptr,
    weight_ptr,
    sum_ptr,
    product_ptr,
    mean_sum_ptr,
    mean_product_ptr,
    channels,
    places,
    groups,
    spans,
    WEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPANS: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    of_group = channels // groups
    within = tl.arange(0, CHANNELS)[None, :]
    channel = program % groups * of_group + within
    total = tl.zeros([SPANS, CHANNELS], dtype=tl.float32)
    product = tl.zeros([SPANS, CHANNELS], dtype=tl.float32)
    for start in range(0, spans, SPANS):
        span = start + tl.arange(0, SPANS)[:, None]
        inside = (span < spans) & (within < of_group)
        at = (sample * spans + span) * channels + channel
        total += tl.load(partial_sum_ptr + at, mask=inside, other=0.0)
        product += tl.load(partial_product_ptr + at, mask=inside, other=0.0)
    of_channels = tl.sum(total, axis=0, keep_dims=True)
    products_of_channels = tl.sum(product, axis=0, keep_dims=True)
    tl.store(sum_ptr + sample * channels + channel, of_channels, mask=within < of_group)
    tl.store(product_ptr + sample * channels + channel, products_of_channels, mask=within < of_group)
    weight = _of_channel(weight_ptr, channel, channels, WEIGHT, 1.0)
    size = (of_group * places).to(tl.float32)
    tl.store(mean_sum_ptr + program, tl.sum(of_channels * weight) / size)
    tl.store(mean_product_ptr + program, tl.sum(products_of_channels * weight) / size)


@jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    mean_sum_ptr,
    mean_product_ptr,
    out_ptr,
    channels,
    places,
    groups,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
    STEPS: tl.constexpr,
    LAST: tl.constexpr,
):
    sample, channel, _, _, first = _position(channels, places, CHANNELS, PLACES, STEPS)
    mean = _of_group(mean_ptr, sample, channel, channels, groups)
    rstd = _of_group(rstd_ptr, sample, channel, channels, groups)
    mean_sum = _of_group(mean_sum_ptr, sample, channel, channels, groups)
    mean_product = _of_group(mean_product_ptr, sample, channel, channels, groups)
    weight = _of_channel(weight_ptr, channel, channels, WEIGHT, 1.0)
    bias = _of_channel(bias_ptr, channel, channels, BIAS, 0.0)
    for step in range(STEPS):
        place = first + step * PLACES + tl.arange(0, PLACES)[None, :]
        inside = (channel < channels) & (place < places)
        at = _at(sample, channel, place, channels, places, LAST)
        normed = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * _silu_gradient(normed * weight + bias)
        at_x = rstd * (grad * weight - mean_sum - normed * mean_product)
        tl.store(out_ptr + at, at_x.to(out_ptr.dtype.element_ty), mask=inside)
