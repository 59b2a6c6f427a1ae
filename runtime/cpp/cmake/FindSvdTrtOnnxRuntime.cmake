# Finds ONNX Runtime, and makes the target svd_trt::onnxruntime.
#
# ONNXRUNTIME_ROOT is a release archive that was unpacked, or a folder with include and lib. Without it, an installed
# package (onnxruntimeConfig.cmake) or the system's folders are searched.
set(_hints ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT})
set(_headers include include/onnxruntime include/onnxruntime/core/session onnxruntime)
if(_hints) # before CMAKE_PREFIX_PATH, which may have another version
  find_path(SVD_TRT_ONNXRUNTIME_INCLUDE onnxruntime_cxx_api.h PATHS ${_hints} PATH_SUFFIXES ${_headers} NO_DEFAULT_PATH)
  find_library(SVD_TRT_ONNXRUNTIME_LIBRARY onnxruntime PATHS ${_hints} PATH_SUFFIXES lib lib64 NO_DEFAULT_PATH)
else()
  find_path(SVD_TRT_ONNXRUNTIME_INCLUDE onnxruntime_cxx_api.h PATH_SUFFIXES ${_headers})
  find_library(SVD_TRT_ONNXRUNTIME_LIBRARY onnxruntime)
endif()
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
