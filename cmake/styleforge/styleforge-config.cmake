# find_package(styleforge) for C++ programs that run models with styleforge's operators.
#
#   list(APPEND CMAKE_PREFIX_PATH <what `python -c "import styleforge; print(styleforge.cmake_prefix_path)"` prints>)
#   find_package(Torch REQUIRED)
#   find_package(styleforge REQUIRED)
#   target_link_libraries(program PRIVATE ${TORCH_LIBRARIES} styleforge::styleforge)
#
# styleforge::styleforge   libstyleforge.so, and libstyleforge_cuda.so where there is one and LibTorch has CUDA; the
#                          program loads them when it starts, which registers the operators
# styleforge::headers      styleforge/load.h alone, for programs that load the libraries themselves
# styleforge_LIBRARY, styleforge_CUDA_LIBRARY   the files
#
# STYLEFORGE_LIBRARY_PATH (a variable of CMake or the environment) names another folder with the libraries.
set(_styleforge_folders "")
foreach(_styleforge_folder "${STYLEFORGE_LIBRARY_PATH}" "$ENV{STYLEFORGE_LIBRARY_PATH}")
  if(_styleforge_folder AND NOT _styleforge_folders)
    set(_styleforge_folders "${_styleforge_folder}")
  endif()
endforeach()
if(NOT _styleforge_folders)
  # In an installation <here> is lib/cmake/styleforge, in a checkout cmake/styleforge.
  get_filename_component(_styleforge_folders "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
  list(APPEND _styleforge_folders "${_styleforge_folders}/build")
endif()
foreach(_styleforge_name styleforge styleforge_cuda)
  find_file(_${_styleforge_name}_file lib${_styleforge_name}.so PATHS ${_styleforge_folders} PATH_SUFFIXES cuda
            NO_DEFAULT_PATH NO_CACHE)
endforeach()
if(_styleforge_file)
  set(styleforge_LIBRARY "${_styleforge_file}")
  set(styleforge_FOUND TRUE)
else()
  list(JOIN _styleforge_folders ", " _styleforge_text)
  set(styleforge_FOUND FALSE)
  set(styleforge_NOT_FOUND_MESSAGE
      "libstyleforge.so is not in ${_styleforge_text}; set STYLEFORGE_LIBRARY_PATH to the folder that holds it")
  return()
endif()
set(styleforge_CUDA_LIBRARY "")
if(_styleforge_cuda_file)
  set(styleforge_CUDA_LIBRARY "${_styleforge_cuda_file}")
endif()

if(NOT TARGET styleforge::headers)
  foreach(_styleforge_up ../../.. ../..)
    get_filename_component(_styleforge_include "${CMAKE_CURRENT_LIST_DIR}/${_styleforge_up}/include" ABSOLUTE)
    if(EXISTS "${_styleforge_include}/styleforge/load.h")
      break()
    endif()
  endforeach()
  add_library(styleforge::headers INTERFACE IMPORTED)
  set_target_properties(styleforge::headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_styleforge_include}"
                        INTERFACE_LINK_LIBRARIES "${CMAKE_DL_LIBS}")

  # No symbol of the libraries is called, and LibTorch's own flags leave --as-needed on for what comes after them: each
  # is named twice, once between flags that keep it, once as the target that gives the path to look in when it runs.
  # (The quotes are for the shell: flags are passed as they are, and a folder's name may have spaces.)
  add_library(styleforge::styleforge SHARED IMPORTED)
  set_target_properties(styleforge::styleforge PROPERTIES
    IMPORTED_LOCATION "${styleforge_LIBRARY}" IMPORTED_SONAME libstyleforge.so
    INTERFACE_LINK_LIBRARIES
      "styleforge::headers;-Wl,--push-state,--no-as-needed,\"${styleforge_LIBRARY}\",--pop-state")
  if(styleforge_CUDA_LIBRARY)
    add_library(styleforge::cuda SHARED IMPORTED)
    set_target_properties(styleforge::cuda PROPERTIES
      IMPORTED_LOCATION "${styleforge_CUDA_LIBRARY}" IMPORTED_SONAME libstyleforge_cuda.so
      INTERFACE_LINK_LIBRARIES "-Wl,--push-state,--no-as-needed,\"${styleforge_CUDA_LIBRARY}\",--pop-state")
    set_property(TARGET styleforge::styleforge APPEND PROPERTY INTERFACE_LINK_LIBRARIES
                 $<$<TARGET_EXISTS:torch_cuda>:styleforge::cuda>)
  endif()
endif()
