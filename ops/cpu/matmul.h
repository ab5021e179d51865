// ATen's matrix products on the CPU.
#pragma once

#include "../stable.h"

namespace styleforge {

// out = a b and out = self + a b (self [n], or [m, n] and then maybe out itself); out is dense. Through the C shim of
// the device's kernels, since torch_call_dispatcher knows no Scalar (addmm's alpha and beta). float32 follows
// PyTorch's flags for oneDNN.
void cpu_mm(const Tensor& out, const Tensor& a, const Tensor& b);
void cpu_addmm(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b);
// out = beta self + alpha a b of every matrix, [B, ., .]
void cpu_baddbmm(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha);

}  // namespace styleforge
