// Matrix products that are not ours.
#pragma once

#include "../stable.h"

namespace styleforge {

// out = a b and out = self + a b (self [n], or [m, n] and then maybe out itself); out is dense. ATen's (cuBLAS),
// through the C shim of the device's kernels, since torch_call_dispatcher knows no Scalar (addmm's alpha and beta).
// Whether float32 takes TF32 is what PyTorch's flags say at the call: no argument carries it, so the Python side sets
// them where they differ from `precision`.
void cublas_mm(const Tensor& out, const Tensor& a, const Tensor& b);
void cublas_addmm(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b);
// out = beta self + alpha a b of every matrix, [B, ., .]
void cublas_baddbmm(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta, double alpha);

}  // namespace styleforge
