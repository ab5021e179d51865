#include "matmul.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

namespace styleforge {

void cublas_mm(const Tensor& out, const Tensor& a, const Tensor& b) {
  check_shim(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()), "aten::mm");
}

void cublas_addmm(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b) {
  check_shim(aoti_torch_cuda_addmm_out(out.get(), self.get(), a.get(), b.get(), 1.0, 1.0), "aten::addmm");
}

void cublas_baddbmm(const Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta,
                    double alpha) {
  check_shim(aoti_torch_cuda_baddbmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha), "aten::baddbmm");
}

}  // namespace styleforge
