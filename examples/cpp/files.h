// Files: tensors as torch.save writes and torch.load reads them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

// Some loaders do not say which file they could not open.
inline std::string readable(const std::string& path) {
  if (!std::ifstream(path)) {
    throw std::runtime_error("cannot read " + path);
  }
  return path;
}

inline at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(readable(path), std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return torch::jit::pickle_load(bytes).toTensor();
}

inline void write_tensor(const at::Tensor& tensor, const std::string& path) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor.cpu());
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw std::runtime_error("cannot write " + path);
  }
}
