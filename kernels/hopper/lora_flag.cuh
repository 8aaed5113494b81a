// The flag by which lora_shrink.cu tells the GEMM after it (nvfp4_gemm.cu) that the activations are
// complete. It has a copy in several cache lines, because all blocks of the GEMM poll it at once.
#pragma once

namespace qerl {

constexpr int kFlagCopies = 4;
constexpr int kFlagLine = 32;  // words of a cache line

}  // namespace qerl
