// How lora_shrink.cu tells the product after it (nvfp4_gemm.cu) that the activations are there: a word set in several cache lines,
// since all blocks of the product look at it at once.
#pragma once

namespace qerl {

constexpr int kFlagCopies = 4;
constexpr int kFlagLine = 32;  // words of a cache line

}  // namespace qerl
