# libstyleforge.so
file(GLOB STYLEFORGE_CPU_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/ops/*.cpp ${PROJECT_SOURCE_DIR}/ops/cpu/*.cpp
     ${PROJECT_SOURCE_DIR}/csrc/cpu/*.cpp)
add_library(styleforge SHARED ${STYLEFORGE_CPU_SOURCES})
target_link_libraries(styleforge PRIVATE styleforge_options ${STYLEFORGE_LIB_torch_cpu} ${STYLEFORGE_LIB_c10})
install(TARGETS styleforge LIBRARY DESTINATION styleforge/lib)

# For C++ programs: find_package(styleforge) and styleforge/load.h.
include(CMakePackageConfigHelpers)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/styleforge-config-version.cmake VERSION ${STYLEFORGE_VERSION}
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_SOURCE_DIR}/cmake/styleforge/styleforge-config.cmake
              ${PROJECT_BINARY_DIR}/styleforge-config-version.cmake DESTINATION styleforge/lib/cmake/styleforge)
install(FILES ${PROJECT_SOURCE_DIR}/include/styleforge/load.h DESTINATION styleforge/include/styleforge)

# csrc/cpu/kernels is compiled once for every instruction set, each time in a namespace of that name, and
# csrc/cpu/dispatch.cpp chooses at run time. Kernels see no torch header and rely on no errno or floating-point traps;
# NaN and infinities keep their meaning (no -ffast-math). The two -Wno-...uninitialized quiet GCC 12's own intrinsics
# headers (GCC bug 105593).
set(_optimize -O3)
if(STYLEFORGE_SANITIZE)
  set(_optimize -O1)  # -O3 with checks in between takes minutes a file
endif()
file(GLOB STYLEFORGE_CPU_KERNELS CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cpu/kernels/*.cpp)
function(styleforge_add_cpu_kernels isa)
  add_library(styleforge_cpu_${isa} OBJECT ${STYLEFORGE_CPU_KERNELS})
  target_compile_definitions(styleforge_cpu_${isa} PRIVATE STYLEFORGE_CPU_ISA=${isa})
  target_compile_options(styleforge_cpu_${isa} PRIVATE -Wall -Wextra -Wno-psabi
                                                       $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized>
                                                       $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>
                                                       ${_optimize} -fno-math-errno -fno-trapping-math
                                                       $<$<BOOL:${STYLEFORGE_WERROR}>:-Werror> ${ARGN})
  target_sources(styleforge PRIVATE $<TARGET_OBJECTS:styleforge_cpu_${isa}>)
endfunction()

styleforge_add_cpu_kernels(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  target_compile_definitions(styleforge PRIVATE STYLEFORGE_CPU_X86)
  styleforge_add_cpu_kernels(avx2 -mavx2 -mfma -mf16c)
  styleforge_add_cpu_kernels(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c
                             -mprefer-vector-width=512)
endif()
