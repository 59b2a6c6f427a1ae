#include "providers.hpp"

#include <array>

#include "error.hpp"
#include "text.hpp"

namespace svd_trt::detail {
namespace {

[[noreturn]] void refuse(const std::string &provider, const std::string &reason) {
  const bool plugin = provider == "tensorrt-rtx";
  throw backend_error("ONNX Runtime " + std::string(OrtGetApiBase()->GetVersionString()) + " cannot use its " +
                      provider + " provider here (" + first_line(reason) + "); " +
                      (plugin ? "it needs an NVIDIA driver and a GPU"
                              : "link the GPU archive of its releases, with the libraries that it names"));
}

void append_cuda(Ort::SessionOptions &session, const DeviceOptions &options) {
  OrtCUDAProviderOptionsV2 *made = nullptr;
  Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&made));
  const std::unique_ptr<OrtCUDAProviderOptionsV2, void (*)(OrtCUDAProviderOptionsV2 *)> cuda(
      made, [](OrtCUDAProviderOptionsV2 *o) { Ort::GetApi().ReleaseCUDAProviderOptions(o); });
  const std::string device = std::to_string(options.device);
  // TF32 rounds the factors of products of fp32 to 10 bits.
  const std::array<const char *, 2> keys{"device_id", "use_tf32"}, values{device.c_str(), "0"};
  Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda.get(), keys.data(), values.data(), keys.size()));
  if (options.stream != nullptr)
    Ort::ThrowOnError(
        Ort::GetApi().UpdateCUDAProviderOptionsWithValue(cuda.get(), "user_compute_stream", options.stream));
  session.AppendExecutionProvider_CUDA_V2(*cuda);
}

void append_tensorrt(Ort::SessionOptions &session, const DeviceOptions &options) {
  OrtTensorRTProviderOptionsV2 *made = nullptr;
  Ort::ThrowOnError(Ort::GetApi().CreateTensorRTProviderOptions(&made));
  const std::unique_ptr<OrtTensorRTProviderOptionsV2, void (*)(OrtTensorRTProviderOptionsV2 *)> tensorrt(
      made, [](OrtTensorRTProviderOptionsV2 *o) { Ort::GetApi().ReleaseTensorRTProviderOptions(o); });
  const std::string device = std::to_string(options.device);
  const std::array<const char *, 1> keys{"device_id"}, values{device.c_str()};
  Ort::ThrowOnError(
      Ort::GetApi().UpdateTensorRTProviderOptions(tensorrt.get(), keys.data(), values.data(), keys.size()));
  if (options.stream != nullptr)
    Ort::ThrowOnError(
        Ort::GetApi().UpdateTensorRTProviderOptionsWithValue(tensorrt.get(), "user_compute_stream", options.stream));
  session.AppendExecutionProvider_TensorRT_V2(*tensorrt);
}

#if ORT_API_VERSION >= 22
constexpr const char *kPlugin = "svd_trt.tensorrt_rtx";

// The plugin is a library of its own, which any ONNX Runtime from 1.22 on loads.
void append_plugin(Ort::SessionOptions &session, const DeviceOptions &options, Environment &environment) {
  Ort::Env &env = environment.env;
  {
    const std::lock_guard<std::mutex> lock(environment.mutex);
    if (environment.plugin.empty()) {
      const std::filesystem::path path = std::filesystem::u8path(options.library);
      env.RegisterExecutionProviderLibrary(kPlugin, path.native());
      environment.plugin = options.library;
    } else if (environment.plugin != options.library) {
      throw argument_error("another pipeline uses the plugin " + echoed(environment.plugin) +
                           "; close it first, or give the same provider_library");
    }
  }
  std::vector<Ort::ConstEpDevice> chosen;
  int index = 0;
  for (const Ort::ConstEpDevice &device : env.GetEpDevices())
    if (std::string(device.EpName()).find("TensorRTRTX") != std::string::npos && index++ == options.device)
      chosen.push_back(device);
  if (chosen.empty()) refuse("tensorrt-rtx", "it found no GPU of that index");
  Ort::KeyValuePairs settings;
  if (options.stream != nullptr)
    settings.Add("user_compute_stream", std::to_string(reinterpret_cast<uintptr_t>(options.stream)).c_str());
  session.AppendExecutionProvider_V2(env, chosen, settings);
}
#else
void append_plugin(Ort::SessionOptions &, const DeviceOptions &, Environment &) {
  refuse("tensorrt-rtx", "this library was compiled with the headers of 1." + std::to_string(ORT_API_VERSION) +
                             ", and plugins need those of 1.22");
}
#endif

} // namespace

void append_provider(Ort::SessionOptions &session, const DeviceOptions &options, Environment &environment) {
  try {
    if (options.provider == "tensorrt-rtx") append_plugin(session, options, environment);
    if (options.provider == "tensorrt") append_tensorrt(session, options);
    // CUDA runs what TensorRT does not take.
    if (options.provider == "cuda" || options.provider == "tensorrt") append_cuda(session, options);
  } catch (const Ort::Exception &error) {
    refuse(options.provider, error.what());
  }
}

void check_device(const DeviceOptions &options) {
  const std::string &p = options.provider;
  if (p != "cpu" && p != "cuda" && p != "tensorrt" && p != "tensorrt-rtx")
    throw argument_error("provider must be one of cpu, cuda, tensorrt, tensorrt-rtx, not " + echoed(p));
  if (options.device < 0) throw argument_error("device must be at least 0, not " + std::to_string(options.device));
  if (options.threads < 0 || options.threads > 4096)
    throw argument_error("threads must be 0 to 4096, not " + std::to_string(options.threads));
  if (p == "tensorrt-rtx" && options.library.empty())
    throw argument_error("the provider tensorrt-rtx is a plugin; give its file as provider_library");
  if (p != "tensorrt-rtx" && !options.library.empty())
    throw argument_error("only the provider tensorrt-rtx takes a provider_library");
  if (p == "cpu" && options.stream != nullptr) throw argument_error("the provider cpu takes no cuda_stream");
}

} // namespace svd_trt::detail
