# Kernels for CUDA: Triton's, compiled here, and what launches them. This needs no CUDA compiler and
# no GPU, only cuda.h, which Triton's package has too, and a Python with triton and torch.
set(GMA_SHAPES "32x32x64;16x16x32" CACHE STRING
  "routing_dim x num_components x value_dim of the models to be served, each a power of two from 16 to 128")
set(GMA_WIDTHS "192;256;512;768;1024;2048" CACHE STRING
  "Widths of the models to be served; kernels for a power of two take all up to it, not as fast")
set(GMA_ARCHITECTURES "90" CACHE STRING "Compute capabilities of the GPUs, times ten")

get_filename_component(repository "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(of_kernels ${CMAKE_CURRENT_LIST_DIR}/cubins.py ${CMAKE_CURRENT_LIST_DIR}/kernels.py)
foreach(file fused/tokens ops/triton/device ops/triton/forward ops/triton/units ops/triton/scans ops/triton/launch ops/triton/limits)
  list(APPEND of_kernels ${repository}/model/${file}.py)
endforeach()

set(GMA_PYTHON "" CACHE FILEPATH "A Python with triton and torch; if empty, the one that is found")
if(GMA_PYTHON)
  set(python "${GMA_PYTHON}")
else()
  find_package(Python3 COMPONENTS Interpreter QUIET)
  set(python "${Python3_EXECUTABLE}")
endif()
set(missing "")
if(NOT python)
  set(missing "a Python (set GMA_PYTHON)")
elseif(NOT EXISTS "${repository}/model/ops/triton/forward.py")
  set(missing "the model's kernels, of the repository that this is a part of")
else()
  # pip's build environment has a PYTHONPATH that hides the packages of the Python it runs on.
  execute_process(
    COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH "${python}" -c
      "import torch, triton.backends.nvidia as here; print(list(here.__path__)[0])"
    OUTPUT_VARIABLE triton RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(failed)
    set(missing "triton and torch for ${python} (set GMA_PYTHON to another)")
  else()
    find_path(GMA_CUDA_INCLUDE cuda.h
      HINTS ENV CUDA_HOME PATHS /usr/local/cuda "${triton}" PATH_SUFFIXES include)
    if(NOT GMA_CUDA_INCLUDE)
      set(missing "cuda.h (set GMA_CUDA_INCLUDE to its folder)")
    endif()
  endif()
endif()

if(missing AND NOT GMA_CUDA STREQUAL AUTO)
  message(FATAL_ERROR "Kernels for CUDA need ${missing}")
elseif(missing)
  message(STATUS "Without kernels for CUDA, which need ${missing}")
else()
  message(STATUS "With kernels for CUDA: ${GMA_SHAPES}; widths ${GMA_WIDTHS}")
  set(cubins "${CMAKE_CURRENT_BINARY_DIR}/cubins")
  add_custom_command(
    OUTPUT ${cubins}/cubins.bin ${cubins}/cubins.inc ${cubins}/cuts.h
    COMMAND ${CMAKE_COMMAND} -E env --unset=TRITON_INTERPRET TRITON_DISABLE_LINE_INFO=1
      "PYTHONPATH=${repository}" "${python}" -m gma.export.ops.cuda.cubins ${cubins}
      --shapes ${GMA_SHAPES} --widths ${GMA_WIDTHS} --architectures ${GMA_ARCHITECTURES}
    DEPENDS ${of_kernels}
    COMMENT "Compiling the kernels for CUDA"
    VERBATIM)
  set(sources ${CMAKE_CURRENT_LIST_DIR}/driver.cc ${CMAKE_CURRENT_LIST_DIR}/operators.cc
    ${CMAKE_CURRENT_LIST_DIR}/products.cc)
  set_source_files_properties(${sources} PROPERTIES
    OBJECT_DEPENDS "${cubins}/cubins.bin;${cubins}/cubins.inc;${cubins}/cuts.h"
    COMPILE_DEFINITIONS "GMA_CUBINS=\"${cubins}/cubins.bin\"")
  target_sources(gma_ops PRIVATE ${sources} ${cubins}/cubins.bin)
  target_compile_definitions(gma_ops PRIVATE GMA_CUDA)
  # Before src, whose cuda.h is another.
  target_include_directories(gma_ops BEFORE PRIVATE "${GMA_CUDA_INCLUDE}" "${cubins}")
  target_link_libraries(gma_ops PRIVATE ${CMAKE_DL_LIBS})
endif()
