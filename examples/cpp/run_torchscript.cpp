// Runs a TorchScript file with styleforge's operators on a tensor that torch.save wrote. The program is linked with
// libstyleforge.so, so the operators are there when it starts.
//
//   run_torchscript MODEL.pt INPUT.pt OUTPUT.pt [DEVICE]        DEVICE: cpu (the default), cuda, cuda:1
#include <ATen/core/grad_mode.h>
#include <styleforge/load.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <iostream>

#include "files.h"

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_torchscript MODEL.pt INPUT.pt OUTPUT.pt [DEVICE]\n";
    return 2;
  }
  try {
    const at::NoGradGuard no_grad;
    const at::Device device(argc > 4 ? argv[4] : "cpu");
    torch::jit::Module model = torch::jit::load(readable(argv[1]), device);
    model.eval();
    const at::Tensor output = model.forward({read_tensor(argv[2]).to(device)}).toTensor();
    write_tensor(output, argv[3]);
    std::cout << "wrote " << argv[3] << ": " << output.sizes() << " " << output.dtype() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << styleforge::explain(error.what()) << "\n";
    return 1;
  }
  return 0;
}
