# libstyleforge_cuda.so: ops/cuda/*.cpp (C++, the C shims) and csrc/cuda/**/*.cu (kernels, no torch header).
# STYLEFORGE_NVCC has been found by CMakeLists.txt.
if(NOT STYLEFORGE_NVCC)
  message(FATAL_ERROR "styleforge: STYLEFORGE_CUDA=ON needs nvcc: put it on PATH, or set CUDACXX or CUDA_HOME")
endif()
set(_requested "${STYLEFORGE_CUDA_ARCHS}")
if(_requested STREQUAL "")
  set(_requested "$ENV{TORCH_CUDA_ARCH_LIST}")
endif()
styleforge_known_archs(_known)
styleforge_resolve_archs(STYLEFORGE_CUDA_ARCHS_RESOLVED "${_requested}" "${_known}")

# Set before the language is enabled: CMake's compiler test would otherwise pick an architecture of its own age.
set(CMAKE_CUDA_ARCHITECTURES ${STYLEFORGE_CUDA_ARCHS_RESOLVED})
set(CMAKE_CUDA_COMPILER ${STYLEFORGE_NVCC})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
find_program(STYLEFORGE_CCACHE ccache)
if(STYLEFORGE_CCACHE AND NOT DEFINED CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${STYLEFORGE_CCACHE})
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(FATAL_ERROR "styleforge: CUDA toolkit >= 12.0 is needed (C++20), found ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
string(REGEX MATCH "^[0-9]+" _toolkit_major "${CMAKE_CUDA_COMPILER_VERSION}")
if(STYLEFORGE_TORCH_HAS_CUDA AND NOT STYLEFORGE_TORCH_CUDA_VERSION MATCHES "^${_toolkit_major}[.]")
  message(WARNING "styleforge: nvcc is ${CMAKE_CUDA_COMPILER_VERSION}, PyTorch's CUDA ${STYLEFORGE_TORCH_CUDA_VERSION}: "
                  "styleforge will refuse to load the CUDA library into this PyTorch; use nvcc of the same major version")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
find_package(CUDAToolkit REQUIRED)

# The checks and stages in ops/*.cpp are compiled into both libraries: LibTorch's stable types are hidden by design, so
# functions that take them cannot be exported. Only what exists once a process comes from libstyleforge.so: the schemas
# and the last path.
file(GLOB STYLEFORGE_CUDA_OPS CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/ops/*.cpp ${PROJECT_SOURCE_DIR}/ops/cuda/*.cpp)
list(REMOVE_ITEM STYLEFORGE_CUDA_OPS ${PROJECT_SOURCE_DIR}/ops/library.cpp ${PROJECT_SOURCE_DIR}/ops/last_path.cpp)
file(GLOB_RECURSE STYLEFORGE_CUDA_KERNELS CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
set(STYLEFORGE_BUILD_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
set(STYLEFORGE_BUILD_CUDA_ARCHS "${STYLEFORGE_CUDA_ARCHS_RESOLVED}")
styleforge_build_info(styleforge_cuda_build_info)
add_library(styleforge_cuda SHARED ${STYLEFORGE_CUDA_OPS} ${STYLEFORGE_CUDA_KERNELS}
                                   ${PROJECT_BINARY_DIR}/styleforge_cuda_build_info.cpp)
target_compile_definitions(styleforge_cuda PRIVATE USE_CUDA)  # the CUDA part of the C shim headers
# Whether GPUs of 9.0 get code with wgmma, which a kernel cannot be asked at run time ("90-virtual" alone has none).
if("${STYLEFORGE_CUDA_ARCHS_RESOLVED}" MATCHES "90a")
  set_source_files_properties(${PROJECT_SOURCE_DIR}/csrc/cuda/common/device_facts.cu
                              PROPERTIES COMPILE_DEFINITIONS STYLEFORGE_CUDA_90A)
endif()
# NDEBUG in every configuration: with assertions in device code ptxas serialises wgmma (warning C7510) and spills.
target_compile_definitions(styleforge_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:NDEBUG>)
# Register spills are shown, but are no error: a few bytes in a cold kernel beat what it takes to avoid them. Every other
# ptxas warning (wgmma serialised, say) is one when STYLEFORGE_WERROR is on.
target_compile_options(styleforge_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra --expt-relaxed-constexpr
                             $<IF:$<BOOL:${STYLEFORGE_WERROR}>,-Werror=all-warnings$<SEMICOLON>-Xptxas=-Werror,-Xptxas=-warn-spills>>)

# The stream shim (aoti_torch_get_current_cuda_stream) lives in libtorch_cuda.so, and Python loads torch's libraries
# with local symbols: the library must name libtorch_cuda.so as needed, or the symbol stays unresolved at run time.
# A stub with that SONAME is enough to link against, and gives the same result whether the PyTorch that builds has CUDA
# or not. It is neither installed nor on any run path.
add_library(styleforge_torch_cuda_stub SHARED ${PROJECT_SOURCE_DIR}/cmake/torch_cuda_stub.cpp)
set_target_properties(styleforge_torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda CXX_VISIBILITY_PRESET default
                      LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/link_stub)

target_link_libraries(styleforge_cuda PRIVATE styleforge_options styleforge ${STYLEFORGE_LIB_torch_cpu}
                      ${STYLEFORGE_LIB_c10} CUDA::cudart_static)
target_link_options(styleforge_cuda PRIVATE "LINKER:--no-as-needed" "LINKER:--no-undefined" "LINKER:--exclude-libs,ALL")
# After the options: --no-as-needed holds for what follows it.
target_link_libraries(styleforge_cuda PRIVATE styleforge_torch_cuda_stub)
install(TARGETS styleforge_cuda LIBRARY DESTINATION styleforge/lib)
