// For C++ programs that run models with styleforge's operators: TorchScript files and AOTInductor packages find an
// operator only where its library has been loaded into the process. A program that is linked with libstyleforge.so
// (styleforge::styleforge in CMake) needs nothing of this; load() does the same at run time, and explain() turns what
// PyTorch says about a missing operator into which file to load. Needs no header of PyTorch.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace styleforge {

// Loads libstyleforge.so, and with `cuda` libstyleforge_cuda.so, from `folder`; an empty one means that of the
// environment variable STYLEFORGE_LIBRARY_PATH or, without it, wherever the system's loader looks. Loading twice is
// harmless. Throws std::runtime_error that names the file.
inline void load(std::string folder = "", bool cuda = false) {
  const char* variable = std::getenv("STYLEFORGE_LIBRARY_PATH");
  if (folder.empty() && variable != nullptr) {
    folder = variable;
  }
  for (const char* name : {"libstyleforge.so", "libstyleforge_cuda.so"}) {
    const std::string path = folder.empty() ? name : folder + "/" + name;
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      const char* reason = dlerror();
      throw std::runtime_error("styleforge: cannot load " + path + ": " +
                               (reason != nullptr ? reason : "unknown error") +
                               "; give the folder that holds it, or set STYLEFORGE_LIBRARY_PATH to it");
    }
    if (!cuda) {
      break;
    }
  }
}

// One line for a failed load or run of a model: which library is missing, if that is what `error` (the what() of
// PyTorch's exception) is about; else the first line of `error`.
inline std::string explain(const std::string& error) {
  const std::size_t start = error.find("styleforge::");
  if (start != std::string::npos) {
    const std::string name =
        error.substr(start, error.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_:", start) - start);
    const char* how =
        "; link with styleforge::styleforge (CMake), or call styleforge::load() before the model is loaded";
    for (const char* unknown : {"Unknown builtin op", "Could not find schema", "Couldn't find an operator"}) {
      if (error.find(unknown) != std::string::npos) {
        return "operator " + name + " is not registered: load libstyleforge.so" + how;
      }
    }
    if (error.find("'CUDA' backend") != std::string::npos) {
      return "operator " + name + " has no CUDA kernels in this process: load libstyleforge_cuda.so" + how;
    }
  }
  return error.substr(0, error.find('\n'));
}

}  // namespace styleforge
