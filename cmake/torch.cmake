# Finds PyTorch's headers and libraries by asking the Python that builds (TorchConfig.cmake would also demand a CUDA
# toolkit that matches and C++ flags of its own; the stable ABI needs neither).
find_package(Python 3.10 COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "
import os, torch
root = os.path.dirname(torch.__file__)
print(';'.join([torch.__version__, os.path.join(root, 'include'), os.path.join(root, 'lib'), torch.version.cuda or '']))
"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _torch_failed)
if(_torch_failed)
  message(FATAL_ERROR "styleforge: ${Python_EXECUTABLE} cannot import torch; install PyTorch >= 2.10 there and build "
                      "with pip install --no-build-isolation")
endif()
list(GET _torch 0 STYLEFORGE_TORCH_VERSION)
list(GET _torch 1 STYLEFORGE_TORCH_INCLUDE_DIRS)
list(GET _torch 2 STYLEFORGE_TORCH_LIB_DIR)
list(LENGTH _torch _torch_length)
set(STYLEFORGE_TORCH_CUDA_VERSION "")
if(_torch_length GREATER 3)
  list(GET _torch 3 STYLEFORGE_TORCH_CUDA_VERSION)
endif()
if(STYLEFORGE_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "styleforge: PyTorch >= 2.10 is needed, found ${STYLEFORGE_TORCH_VERSION}")
endif()
if(STYLEFORGE_TORCH_CUDA_VERSION)
  set(STYLEFORGE_TORCH_HAS_CUDA ON)
else()
  set(STYLEFORGE_TORCH_HAS_CUDA OFF)
endif()

foreach(name torch_cpu c10)
  unset(STYLEFORGE_LIB_${name} CACHE)  # another PyTorch than at the last configure run leaves a stale path
  find_library(STYLEFORGE_LIB_${name} ${name} PATHS ${STYLEFORGE_TORCH_LIB_DIR} NO_DEFAULT_PATH REQUIRED)
endforeach()
