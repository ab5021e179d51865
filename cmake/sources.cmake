# What first-use building (python/styleforge/build) makes the CUDA library of, inside the installed package. The CPU
# kernels are not among it: the CUDA library is linked against the installed main library.
set(_sources styleforge/_sources)
install(FILES ${PROJECT_SOURCE_DIR}/CMakeLists.txt DESTINATION ${_sources})
install(FILES ${PROJECT_SOURCE_DIR}/python/styleforge/_version.py DESTINATION ${_sources}/python/styleforge)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/cmake ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/ops
        DESTINATION ${_sources} PATTERN cpu EXCLUDE PATTERN cpu.cmake EXCLUDE)
