"""block_values_nvfp4 and dequantize_nvfp4, over every byte and every block scale there is."""

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import preset_name_to_scheme

from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4, dequantize_nvfp4

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def e2m1(code):
    """Returns the value of a 4-bit code by the definition of the format: sign, 2 exponent bits
    (bias 1), 1 mantissa bit."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if code >> 3 else magnitude


def e4m3(byte):
    """Returns the value of an E4M3 byte: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f and
    0xff are NaN."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -magnitude if byte >> 7 else magnitude


def everything():
    """Returns packed [254, 256]: each row all bytes; scale [254, 32]: each row one finite E4M3
    value; values [254, 512]."""
    scales = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    scale = torch.tensor(scales, dtype=torch.uint8).view(-1, 1).repeat(1, 32).view(torch.float8_e4m3fn)
    codes = torch.tensor([e2m1(code) for byte in range(256) for code in (byte & 15, byte >> 4)], dtype=torch.float64)
    values = torch.tensor([e4m3(byte) for byte in scales], dtype=torch.float64).view(-1, 1) * codes
    return packed, scale, values


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale_is_exact(dtype):
    packed, scale, values = everything()
    got = block_values_nvfp4(packed, scale, dtype)
    assert got.dtype == dtype and got.shape == (254, 512)
    assert torch.equal(got.double(), values)
    assert torch.equal(block_values_nvfp4(packed, scale.view(torch.uint8), dtype), got)


def test_unpacking_is_that_of_compressed_tensors():
    packed, scale, _ = everything()
    got = block_values_nvfp4(packed[:1], torch.ones(1, 32).to(torch.float8_e4m3fn), torch.float32)
    assert torch.equal(got, unpack_fp4_from_uint8(packed[:1], 1, 512, dtype=torch.float32))
    # and its packing is the inverse (it keeps the sign of zero, which torch.equal does not see)
    assert torch.equal(pack_fp4_to_uint8(got), packed[:1])


@pytest.mark.parametrize("global_scale", [1.0, 2.0**-7, 14336.0, 2688 / 0.19])
def test_dequantized_is_what_compressed_tensors_decompresses(global_scale):
    packed, scale, values = everything()
    global_scale = torch.tensor([global_scale])
    state = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale}
    theirs = NVFP4PackedCompressor.decompress(state, preset_name_to_scheme("NVFP4A16", ["Linear"]))["weight"]
    ours = dequantize_nvfp4(packed, scale, global_scale)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    # they round scale / global_scale to float32 before they multiply: the last bit may differ where
    # that is inexact
    assert (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs().max() <= 1
    assert (ours == theirs).float().mean() > 0.999
    if global_scale.log2().frac() == 0:
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.double(), values / global_scale.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_is_the_quotient(dtype):
    packed, scale, values = everything()
    global_scale = torch.tensor([2688 / 0.19])
    got = dequantize_nvfp4(packed, scale, global_scale, dtype)
    want = values / global_scale.double()
    assert got.dtype == dtype
    # half the spacing of subnormals, twice
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps / 1.99 * want.abs() + tiny / 1.99).all()


def test_blocks_are_sixteen_consecutive_input_channels():
    packed = torch.full((2, 16), 0x22, dtype=torch.uint8)  # ones
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(torch.float8_e4m3fn)
    got = block_values_nvfp4(packed, scale, torch.float32)
    assert torch.equal(got, torch.tensor([[1.0] * 16 + [2.0] * 16, [3.0] * 16 + [4.0] * 16]))


def test_even_channel_is_the_low_nibble():
    packed = torch.full((1, 8), 0x51, dtype=torch.uint8)
    got = block_values_nvfp4(packed, torch.ones(1, 1).to(torch.float8_e4m3fn), torch.float32)
    assert got.flatten().tolist() == [0.5, 3.0] * 8


@pytest.mark.parametrize("packed, scale", [((4, 16), (4, 1)), ((4, 16), (2, 2)), ((4, 12), (4, 1)), ((4, 8), (4, 2))])
def test_rejects_shapes_that_do_not_belong_together(packed, scale):
    with pytest.raises(ValueError, match="need scales of shape"):
        block_values_nvfp4(
            torch.zeros(packed, dtype=torch.uint8), torch.zeros(scale, dtype=torch.uint8), torch.bfloat16
        )
