// Runs an AOTInductor package (.pt2) with styleforge's operators on a tensor that torch.save wrote. The program loads
// libstyleforge.so itself, from STYLEFORGE_LIBRARY_PATH or a folder that it is given.
//
//   run_aoti MODEL.pt2 INPUT.pt OUTPUT.pt [DEVICE [FOLDER]]     DEVICE: as the package was made for; cpu, cuda
#include <ATen/core/grad_mode.h>
#include <styleforge/load.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

#include "files.h"

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_aoti MODEL.pt2 INPUT.pt OUTPUT.pt [DEVICE [FOLDER]]\n";
    return 2;
  }
  try {
    const at::NoGradGuard no_grad;
    const at::Device device(argc > 4 ? argv[4] : "cpu");
    styleforge::load(argc > 5 ? argv[5] : "", device.is_cuda());
    torch::inductor::AOTIModelPackageLoader model(readable(argv[1]));
    const at::Tensor output = model.run({read_tensor(argv[2]).to(device)}).at(0);
    write_tensor(output, argv[3]);
    std::cout << "wrote " << argv[3] << ": " << output.sizes() << " " << output.dtype() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << styleforge::explain(error.what()) << "\n";
    return 1;
  }
  return 0;
}
