// Runs a TorchScript file in several threads at once, each of which also makes a call that must fail.
//
//   threads MODEL.pt INPUT.pt THREADS CALLS
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <atomic>
#include <cstdlib>
#include <iostream>
#include <thread>

#include "../../examples/cpp/files.h"

int main(int, char** argv) {
  torch::jit::Module model = torch::jit::load(argv[1]);
  model.eval();
  const at::Tensor input = read_tensor(argv[2]);
  const auto run = [&](const at::Tensor& x) {
    const at::NoGradGuard no_grad;  // of this thread
    return model.forward({x}).toTensor();
  };
  const at::Tensor expected = run(input);
  std::atomic<int> equal{0}, refused{0};
  const auto work = [&] {
    for (int call = 0; call < std::atoi(argv[4]); ++call) equal += at::equal(run(input), expected);
    try {
      run(input[0]);
    } catch (const std::exception& error) {
      refused += std::string(error.what()).find("input must have shape [N, C, H, W]") != std::string::npos;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < std::atoi(argv[3]); ++i) threads.emplace_back(work);
  for (auto& thread : threads) thread.join();
  std::cout << equal << " equal, " << refused << " refused\n";
}
