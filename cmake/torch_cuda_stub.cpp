// Stands in for PyTorch's libtorch_cuda.so while linking libstyleforge_cuda.so (see cuda.cmake); never loaded. Holds
// the C-shim functions that PyTorch keeps in that library and that ops/cuda uses; a link error "undefined reference"
// to another one means: add its name here. The signatures do not matter to the linker.
#define STUB(name) \
  extern "C" void name() {}

STUB(aoti_torch_get_current_cuda_stream)
STUB(aoti_torch_cuda__efficient_attention_backward)
STUB(aoti_torch_cuda__scaled_dot_product_cudnn_attention)
STUB(aoti_torch_cuda__scaled_dot_product_efficient_attention)
STUB(aoti_torch_cuda__scaled_dot_product_flash_attention)
STUB(aoti_torch_cuda__scaled_dot_product_flash_attention_backward)
STUB(aoti_torch_cuda_addmm_out)
STUB(aoti_torch_cuda_baddbmm_out)
STUB(aoti_torch_cuda_mm_out)
STUB(aoti_torch_create_cuda_guard)
STUB(aoti_torch_delete_cuda_guard)
STUB(aoti_torch_cuda_guard_set_index)
STUB(torch_c10_cuda_check_msg)
STUB(torch_c10_cuda_free_error_msg)
