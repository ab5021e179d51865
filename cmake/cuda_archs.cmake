# STYLEFORGE_NVCC, and from STYLEFORGE_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST the list that CMAKE_CUDA_ARCHITECTURES takes.
#
# One architecture is written "90a", "9.0a", "90a-real", "90a-virtual" or "9.0a+PTX"; commas, semicolons and blanks
# separate. Plain entries become machine code only; if no entry asks for PTX, the highest one without an "a" or "f"
# suffix also carries its PTX, so that GPUs newer than the toolkit can run the library (PTX of a suffixed architecture
# runs on that architecture alone). Machine code for 90 is always that of 90a: no other device runs either, and wgmma is
# in 90a alone.

set(STYLEFORGE_DEFAULT_CUDA_ARCHS 75 80 86 89 90a 100 120)

# The same order of precedence as CMake's own detection, plus the toolkit folder that PyTorch's extensions look at.
function(styleforge_find_nvcc)
  if(CMAKE_CUDA_COMPILER)
    set(STYLEFORGE_NVCC ${CMAKE_CUDA_COMPILER} CACHE FILEPATH "The CUDA compiler")
  elseif(DEFINED ENV{CUDACXX})
    set(STYLEFORGE_NVCC $ENV{CUDACXX} CACHE FILEPATH "The CUDA compiler")
  else()
    find_program(STYLEFORGE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin PATHS /usr/local/cuda/bin
                 DOC "The CUDA compiler")
  endif()
endfunction()

# Numbers ("75;80;90") that the toolkit can compile for.
function(styleforge_known_archs result)
  execute_process(COMMAND ${STYLEFORGE_NVCC} --list-gpu-arch OUTPUT_VARIABLE listed RESULT_VARIABLE failed
                  ERROR_VARIABLE reason)
  if(failed)
    message(FATAL_ERROR "styleforge: ${STYLEFORGE_NVCC} --list-gpu-arch failed: ${reason}")
  endif()
  string(REGEX MATCHALL "compute_[0-9]+" known "${listed}")
  list(TRANSFORM known REPLACE "compute_" "")
  set(${result} ${known} PARENT_SCOPE)
endfunction()

# styleforge_resolve_archs(<result> <requested> <known>): pure function of its arguments, tested by tests/test_build.py.
function(styleforge_resolve_archs result requested known)
  if(requested STREQUAL "")
    foreach(arch ${STYLEFORGE_DEFAULT_CUDA_ARCHS})
      string(REGEX REPLACE "[af]$" "" number ${arch})
      if(number IN_LIST known)
        list(APPEND requested ${arch})
      endif()
    endforeach()
  endif()
  string(REGEX REPLACE "[, ]+" ";" requested "${requested}")
  set(real "")
  set(virtual "")
  set(highest 0)
  foreach(arch ${requested})
    if(NOT arch MATCHES "^([0-9]+)[.]?([0-9])([af]?)([+]PTX|-real|-virtual)?$")
      message(FATAL_ERROR "styleforge: CUDA architecture \"${arch}\" is not understood; write it as 90a, 9.0a or 9.0+PTX")
    endif()
    set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
    set(name ${number}${CMAKE_MATCH_3})
    set(plain_name "${CMAKE_MATCH_3}")
    set(form "${CMAKE_MATCH_4}")
    if(NOT number IN_LIST known)
      list(JOIN known " " known_text)
      message(FATAL_ERROR "styleforge: ${STYLEFORGE_NVCC} cannot compile for architecture ${name}; it knows ${known_text}")
    endif()
    if(NOT form STREQUAL "-virtual")
      if(name STREQUAL "90")
        list(APPEND real 90a-real)
      else()
        list(APPEND real ${name}-real)
      endif()
    endif()
    if(form STREQUAL "-virtual" OR form STREQUAL "+PTX")
      list(APPEND virtual ${name}-virtual)
    endif()
    if(plain_name STREQUAL "" AND number GREATER highest)
      set(highest ${number})
    endif()
  endforeach()
  if(virtual STREQUAL "" AND highest GREATER 0)
    list(APPEND virtual ${highest}-virtual)
  endif()
  set(archs ${real} ${virtual})
  list(REMOVE_DUPLICATES archs)
  set(${result} ${archs} PARENT_SCOPE)
endfunction()
