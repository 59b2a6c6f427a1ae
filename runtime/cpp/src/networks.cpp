#include "networks.hpp"

#include <algorithm>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "error.hpp"
#include "providers.hpp"
#include "text.hpp"

namespace svd_trt::detail {
namespace {

// ONNX Runtime counts all processors of the machine by default.
int usable_processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

} // namespace

std::shared_ptr<Environment> environment() {
  static std::mutex mutex;
  static std::weak_ptr<Environment> shared;
  const std::lock_guard<std::mutex> lock(mutex);
  if (std::shared_ptr<Environment> found = shared.lock()) return found;
  const OrtApi *api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (api == nullptr)
    throw backend_error(std::string("this library was compiled for ONNX Runtime 1.") + std::to_string(ORT_API_VERSION) +
                        " or newer, and " + OrtGetApiBase()->GetVersionString() + " is installed; update it");
  Ort::InitApi(api);
  auto made = std::make_shared<Environment>();
  shared = made;
  return made;
}

Ort::Value view(float *data, const std::vector<int64_t> &shape) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<float>(memory, data, elements(shape), shape.data(), shape.size());
}

Ort::Value view(uint8_t *data, const std::vector<int64_t> &shape) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<uint8_t>(memory, data, elements(shape), shape.data(), shape.size());
}

void Cancellation::cancel(const std::string &reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (cancelled_) return;
  reason_ = reason;
  cancelled_ = true;
  options_.SetTerminate(); // a run that is under way ends before its next node
}

void Cancellation::check() const {
  if (!cancelled_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  throw Failure(SVD_TRT_CANCELLED, reason_);
}

Session::Session(const Bundle &bundle, const std::string &name, const DeviceOptions &options,
                 std::shared_ptr<Environment> env)
    : spec_(bundle.manifest.networks.at(name)), name_(name), env_(std::move(env)) {
  const std::filesystem::path path = bundle.graph(name);
  try {
    Ort::SessionOptions session;
    session.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
    session.SetIntraOpNumThreads(options.threads > 0 ? options.threads : usable_processors());
    if (options.provider == "cpu") session.DisableMemPattern(); // memory would double: see runtime/cpu_device.py
    append_provider(session, options, *env_);
    session_ = Ort::Session(env_->env, path.c_str(), session);
    if (options.provider != "cpu") {
      memory_ = Ort::MemoryInfo("Cuda", OrtDeviceAllocator, options.device, OrtMemTypeDefault);
      allocator_ = std::make_unique<Ort::Allocator>(session_, memory_);
    }
  } catch (const Ort::Exception &error) {
    throw backend_error("onnxruntime cannot load " + path.u8string() + ": " + first_line(error.what()));
  }
}

Ort::Value Session::empty(const std::vector<int64_t> &shape, Type type) {
  const auto element = type == Type::uint8     ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                       : type == Type::float16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                               : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  const std::lock_guard<std::mutex> lock(allocating_);
  OrtAllocator *allocator = allocator_ ? static_cast<OrtAllocator *>(*allocator_) : nullptr;
  if (allocator == nullptr) allocator = Ort::AllocatorWithDefaultOptions();
  return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), element);
}

void Session::run(Ort::IoBinding &binding, const Cancellation &cancellation) {
  cancellation.check();
  try {
    session_.Run(cancellation.options(), binding);
  } catch (const Ort::Exception &error) {
    cancellation.check();
    throw backend_error("onnxruntime failed in " + name_ + ": " + first_line(error.what()));
  }
  cancellation.check();
}

Networks::Networks(const Bundle &bundle, DeviceOptions options) : bundle_(bundle), options_(std::move(options)) {
  check_device(options_);
  env_ = environment();
  if (options_.provider == "cpu") return;
  Ort::SessionOptions probe; // fails now, not when the first network is loaded, if the provider is missing
  append_provider(probe, options_, *env_);
}

std::shared_ptr<Session> Networks::get(const std::string &name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Session> &session = sessions_[name];
  if (!session) session = std::make_shared<Session>(bundle_, name, options_, env_);
  return session;
}

void Networks::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  sessions_.clear();
}

} // namespace svd_trt::detail
