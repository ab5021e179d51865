# What a library was built from, for diagnostics: a JSON text inside the library, returned by an exported C function
# and, behind the marker STYLEFORGE_BUILD_INFO=, readable from the file without loading it (`strings` shows it).
file(STRINGS ${PROJECT_SOURCE_DIR}/python/styleforge/_version.py _version_line REGEX "^__version__")
string(REGEX REPLACE ".*\"(.*)\".*" "\\1" STYLEFORGE_VERSION "${_version_line}")

# styleforge_build_info(<function>): writes <function>.cpp into the build folder.
function(styleforge_build_info function)
  set(fields "\"styleforge\": \"${STYLEFORGE_VERSION}\"" "\"pytorch\": \"${STYLEFORGE_TORCH_VERSION}\""
             "\"compiler\": \"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\""
             "\"build_type\": \"${CMAKE_BUILD_TYPE}\"")
  if(STYLEFORGE_BUILD_CUDA_VERSION)
    list(JOIN STYLEFORGE_BUILD_CUDA_ARCHS " " archs)
    list(APPEND fields "\"cuda\": \"${STYLEFORGE_BUILD_CUDA_VERSION}\"" "\"cuda_archs\": \"${archs}\"")
  endif()
  list(JOIN fields ", " STYLEFORGE_BUILD_INFO_JSON)
  set(STYLEFORGE_BUILD_INFO_FUNCTION ${function})
  configure_file(${PROJECT_SOURCE_DIR}/cmake/build_info.cpp.in ${PROJECT_BINARY_DIR}/${function}.cpp @ONLY)
endfunction()
