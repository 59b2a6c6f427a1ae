# Finds ONNX Runtime, and makes the target svd_trt::onnxruntime.
#
# ONNXRUNTIME_ROOT is a release archive that was unpacked, or a folder with include and lib. Without it, an installed
# package (onnxruntimeConfig.cmake) or the system's folders are searched.
set(_hints ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT})
find_path(SVD_TRT_ONNXRUNTIME_INCLUDE onnxruntime_cxx_api.h HINTS ${_hints}
  PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime)
find_library(SVD_TRT_ONNXRUNTIME_LIBRARY onnxruntime HINTS ${_hints} PATH_SUFFIXES lib lib64)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(SvdTrtOnnxRuntime
  REQUIRED_VARS SVD_TRT_ONNXRUNTIME_LIBRARY SVD_TRT_ONNXRUNTIME_INCLUDE
  REASON_FAILURE_MESSAGE "set -DONNXRUNTIME_ROOT= to an unpacked release archive of ONNX Runtime")
mark_as_advanced(SVD_TRT_ONNXRUNTIME_INCLUDE SVD_TRT_ONNXRUNTIME_LIBRARY)
if(SvdTrtOnnxRuntime_FOUND)
  get_filename_component(SVD_TRT_ONNXRUNTIME_LIBDIR ${SVD_TRT_ONNXRUNTIME_LIBRARY} DIRECTORY)
  if(NOT TARGET svd_trt::onnxruntime)
    add_library(svd_trt::onnxruntime UNKNOWN IMPORTED)
    set_target_properties(svd_trt::onnxruntime PROPERTIES
      IMPORTED_LOCATION ${SVD_TRT_ONNXRUNTIME_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${SVD_TRT_ONNXRUNTIME_INCLUDE}
      INTERFACE_SYSTEM_INCLUDE_DIRECTORIES ${SVD_TRT_ONNXRUNTIME_INCLUDE})
  endif()
endif()
