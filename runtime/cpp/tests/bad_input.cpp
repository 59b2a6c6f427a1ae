// Every bad input of the C interface gives a code and a message: nothing is leaked, and nothing aborts.
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>

#include "bundle.hpp"

namespace fs = std::filesystem;

namespace {

// One pipeline for all cases, because opening one reads the whole bundle.
svd_trt_pipeline *opened_once() {
  static svd_trt_pipeline *pipeline = nullptr;
  if (pipeline == nullptr) REQUIRE(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, &pipeline) == SVD_TRT_OK);
  return pipeline;
}

struct Open {
  svd_trt_pipeline *pipeline = opened_once();
  TestPicture test = make_picture(40, 30);
  svd_trt_picture picture{sizeof(svd_trt_picture), test.pixels.data(), test.width, test.height, 0};
  svd_trt_arguments arguments{};

  Open() { REQUIRE(svd_trt_arguments_init(pipeline, &arguments, sizeof arguments) == SVD_TRT_OK); }

  // Opens a stream; the message if it is refused with `status`.
  std::string refused(svd_trt_status status) {
    svd_trt_stream *stream = nullptr;
    const svd_trt_status found = svd_trt_stream_open(pipeline, &picture, 1, &arguments, nullptr, &stream);
    CHECK(found == status);
    CHECK(stream == nullptr);
    std::string message = svd_trt_last_error();
    CHECK(!message.empty());
    CHECK(message.find('\n') == std::string::npos);
    return message;
  }
};

bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

// A copy of the bundle that a test damages.
class Copy {
public:
  // Weights are links to those of the bundle; a test must not write to them.
  Copy()
      : path(fs::temp_directory_path() / ("svd_trt_bad_input_" + std::to_string(reinterpret_cast<uintptr_t>(this)))) {
    fs::remove_all(path);
    for (const fs::directory_entry &entry : fs::recursive_directory_iterator(bundle_path())) {
      const fs::path target = path / fs::relative(entry.path(), bundle_path());
      if (entry.is_directory())
        fs::create_directories(target);
      else if (fs::create_directories(target.parent_path()); entry.path().extension() == ".data")
        fs::create_symlink(fs::absolute(entry.path()), target);
      else
        fs::copy_file(entry.path(), target);
    }
  }
  ~Copy() { fs::remove_all(path); }

  std::string refused(bool verify = true) const {
    svd_trt_open_options options;
    svd_trt_open_options_init(&options, sizeof options);
    options.verify = verify;
    svd_trt_pipeline *pipeline = nullptr;
    CHECK(svd_trt_pipeline_open(path.u8string().c_str(), &options, &pipeline) == SVD_TRT_BUNDLE_ERROR);
    CHECK(pipeline == nullptr);
    return svd_trt_last_error();
  }
  void replace(const char *name, const std::string &from, const std::string &to) const {
    std::ifstream in(path / name, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(in), {}};
    const size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    std::ofstream(path / name, std::ios::binary) << text.replace(at, from.size(), to);
  }

  const fs::path path;
};

} // namespace

TEST_CASE("null, closed and invented handles") {
  svd_trt_frame frame{};
  frame.size = sizeof frame;
  int64_t count = 0;
  const char *text = nullptr;
  int variable = 0;
  Open open;
  svd_trt_stream *closed_stream = nullptr;
  REQUIRE(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, nullptr, &closed_stream) == SVD_TRT_OK);
  REQUIRE(svd_trt_stream_close(closed_stream) == SVD_TRT_OK);
  svd_trt_pipeline *closed_pipeline = nullptr;
  REQUIRE(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, &closed_pipeline) == SVD_TRT_OK);
  REQUIRE(svd_trt_pipeline_close(closed_pipeline) == SVD_TRT_OK);

  // A pipeline where a stream is wanted is refused too.
  for (svd_trt_stream *bad :
       {static_cast<svd_trt_stream *>(nullptr), closed_stream, reinterpret_cast<svd_trt_stream *>(&variable),
        reinterpret_cast<svd_trt_stream *>(open.pipeline)}) {
    CHECK(svd_trt_stream_next(bad, &frame) == SVD_TRT_HANDLE_ERROR);
    CHECK(std::string(svd_trt_last_error()) == "the stream is null or closed; open one with svd_trt_stream_open");
    CHECK(svd_trt_stream_cancel(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_close(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_videos(bad, &count) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_settings(bad, &open.arguments) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_latents(bad, nullptr, 0, reinterpret_cast<size_t *>(&count)) == SVD_TRT_HANDLE_ERROR);
  }
  for (svd_trt_pipeline *bad :
       {static_cast<svd_trt_pipeline *>(nullptr), closed_pipeline, reinterpret_cast<svd_trt_pipeline *>(&variable)}) {
    svd_trt_stream *stream = nullptr;
    CHECK(svd_trt_pipeline_close(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_pipeline_cancel(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_pipeline_release(bad) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_pipeline_manifest(bad, &text) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_pipeline_self_test(bad, nullptr, nullptr) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_arguments_init(bad, &open.arguments, sizeof open.arguments) == SVD_TRT_HANDLE_ERROR);
    CHECK(svd_trt_stream_open(bad, &open.picture, 1, nullptr, nullptr, &stream) == SVD_TRT_HANDLE_ERROR);
    CHECK(contains(svd_trt_last_error(), "the pipeline is null or closed"));
  }
}

TEST_CASE("null pointers") {
  Open open;
  svd_trt_stream *stream = nullptr;
  svd_trt_pipeline *pipeline = nullptr;
  CHECK(svd_trt_pipeline_open(nullptr, nullptr, &pipeline) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_open_options_init(nullptr, 0) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_arguments_init(open.pipeline, nullptr, 0) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_picture_init(nullptr, 0) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_options_init(nullptr, 0) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_pipeline_manifest(open.pipeline, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_open(open.pipeline, nullptr, 1, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 0, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, nullptr, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_generate(open.pipeline, &open.picture, 1, nullptr, nullptr, nullptr, nullptr) ==
        SVD_TRT_ARGUMENT_ERROR);
  REQUIRE(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, nullptr, &stream) == SVD_TRT_OK);
  CHECK(svd_trt_stream_next(stream, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_videos(stream, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_settings(stream, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_latents(stream, nullptr, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_close(stream) == SVD_TRT_OK);
}

TEST_CASE("structures of a wrong size") {
  Open open;
  svd_trt_stream *stream = nullptr;
  for (const size_t size : {size_t{0}, size_t{8}, sizeof(svd_trt_arguments) - 1, size_t{1} << 40}) {
    svd_trt_arguments arguments = open.arguments;
    arguments.size = size;
    CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, &arguments, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
    CHECK(contains(svd_trt_last_error(), "call svd_trt_arguments_init first"));
    CHECK(svd_trt_arguments_init(open.pipeline, &arguments, size) == SVD_TRT_ARGUMENT_ERROR);
  }
  svd_trt_picture picture = open.picture;
  picture.size = 0;
  CHECK(svd_trt_stream_open(open.pipeline, &picture, 1, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  svd_trt_picture two[2] = {open.picture, open.picture};
  two[1].size = 8;
  CHECK(svd_trt_stream_open(open.pipeline, two, 2, nullptr, nullptr, &stream) == SVD_TRT_ARGUMENT_ERROR);
  REQUIRE(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, nullptr, &stream) == SVD_TRT_OK);
  svd_trt_frame frame{};
  CHECK(svd_trt_stream_next(stream, &frame) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(svd_trt_stream_close(stream) == SVD_TRT_OK);
}

TEST_CASE("arguments outside their limits") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const auto with = [](auto field, auto value) {
    Open open;
    open.arguments.*field = value;
    return open.refused(SVD_TRT_ARGUMENT_ERROR);
  };
  using A = svd_trt_arguments;
  CHECK(contains(with(&A::num_frames, 1), "num_frames 1 is outside what this bundle was built for (2 to "));
  CHECK(contains(with(&A::num_frames, 100000), "build one with another --frames"));
  CHECK(contains(with(&A::num_frames, std::numeric_limits<int64_t>::min()), "num_frames"));
  CHECK(with(&A::num_inference_steps, -1) == "num_inference_steps must be 1 to 1000, not -1");
  CHECK(with(&A::num_inference_steps, 1001) == "num_inference_steps must be 1 to 1000, not 1001");
  CHECK(with(&A::min_guidance_scale, nan) == "min_guidance_scale must be a number, not nan");
  CHECK(with(&A::max_guidance_scale, infinity) == "max_guidance_scale must be a number, not inf");
  CHECK(with(&A::max_guidance_scale, 101.0) == "max_guidance_scale must be -100 to 100, not 101");
  CHECK(with(&A::noise_aug_strength, -0.5) == "noise_aug_strength must be 0 to 100, not -0.5");
  CHECK(with(&A::fps, 0) == "fps must be 1 to 1000, not 0");
  CHECK(with(&A::motion_bucket_id, -1) == "motion_bucket_id must be 0 to 10000, not -1");
  CHECK(with(&A::num_videos_per_prompt, 0) == "num_videos_per_prompt must be 1 to 1000, not 0");
  CHECK(with(&A::decode_chunk_size, -1) == "decode_chunk_size must be at least 1, not -1");
  CHECK(contains(with(&A::height, 0), "height 0 is outside what this bundle was built for"));
  CHECK(contains(with(&A::width, 33), "width 33 is "));
  CHECK(with(&A::sampler, "dpm") == "sampler must be one of euler, unic, dpmpp-2m, ab2, not 'dpm'");
  CHECK(with(&A::schedule, "linear") == "schedule must be one of karras, exponential, ays, not 'linear'");
  CHECK(with(&A::quality, "ultra") == "quality must be one of best, standard, fast, draft, not 'ultra'");
  CHECK(with(&A::resize_mode, "zoom") == "resize_mode must be one of stretch, crop, pad, not 'zoom'");
  CHECK(contains(with(&A::background, "#12345"), "background must be black, white or a colour such as #ff8000"));
  const std::string long_text(100000, 'x');
  CHECK(with(&A::sampler, long_text.c_str()).size() < 200);
}

TEST_CASE("sigmas that cannot be used") {
  Open open;
  const double values[] = {1, 2, 0}, not_a_number[] = {std::numeric_limits<double>::quiet_NaN(), 0};
  open.arguments.sigmas_count = 3;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "sigmas is null, and sigmas_count is not 0");
  open.arguments.sigmas = values;
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "sigmas must decrease, and 1, 2, 0 do not");
  open.arguments.schedule = "ays";
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) == "schedule and sigmas were both given; give one of them");
  open.arguments.schedule = nullptr;
  open.arguments.sigmas_count = 0;
  CHECK(contains(open.refused(SVD_TRT_ARGUMENT_ERROR), "at least two numbers"));
  open.arguments.sigmas = not_a_number, open.arguments.sigmas_count = 2;
  CHECK(contains(open.refused(SVD_TRT_ARGUMENT_ERROR), "between 0 and 1e+06"));
}

TEST_CASE("guidance that cannot be used") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto with = [](double low, double high) {
    Open open;
    const double interval[] = {low, high};
    open.arguments.guidance_interval = interval;
    return open.refused(SVD_TRT_ARGUMENT_ERROR);
  };
  const std::string rule = "guidance_interval must be two noise levels from 0 to 1e+06, the lower one first, such as "
                           "0,50, not ";
  CHECK(with(50, 0) == rule + "50, 0");
  CHECK(with(5, 5) == rule + "5, 5");
  CHECK(with(-1, 5) == rule + "-1, 5");
  CHECK(with(nan, 5) == rule + "nan, 5");
  CHECK(with(0, nan) == rule + "0, nan");
  CHECK(contains(with(800, 900), "no step has a noise level above 800 and up to 900"));
  Open open;
  open.arguments.guidance_shape = "square";
  CHECK(open.refused(SVD_TRT_ARGUMENT_ERROR) ==
        "guidance_shape must be one of linear, constant, triangular, not 'square'");
}

TEST_CASE("pictures that cannot be used") {
  const auto with = [](auto field, auto value) {
    Open open;
    open.picture.*field = value;
    return open.refused(SVD_TRT_IMAGE_ERROR);
  };
  using P = svd_trt_picture;
  CHECK(with(&P::data, nullptr) == "a picture has no data");
  CHECK(with(&P::width, 0) == "a picture has the size 0x30; pass one that is not empty");
  CHECK(with(&P::height, -5) == "a picture has the size 40x-5; pass one that is not empty");
  CHECK(contains(with(&P::width, std::numeric_limits<int64_t>::max()), "too large"));
  CHECK(contains(with(&P::height, 1 << 20), "too large"));
  CHECK(with(&P::stride, 119) == "the stride of a picture is 119 bytes, and a row of 40 pixels has 120");
  CHECK(contains(with(&P::stride, -120), "the stride of a picture is -120"));
  Open open;
  svd_trt_stream *stream = nullptr;
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, size_t{1} << 60, nullptr, nullptr, &stream) ==
        SVD_TRT_ARGUMENT_ERROR);
}

TEST_CASE("latents of a wrong size, frames on a device that is not there") {
  Open open;
  svd_trt_stream_options options;
  REQUIRE(svd_trt_stream_options_init(&options, sizeof options) == SVD_TRT_OK);
  svd_trt_stream *stream = nullptr;
  const float one = 1;
  options.latents_count = 1;
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, &options, &stream) == SVD_TRT_ARGUMENT_ERROR);
  options.latents = &one;
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, &options, &stream) == SVD_TRT_ARGUMENT_ERROR);
  options.latents_count = size_t{1} << 62; // must be refused before it is read
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, &options, &stream) == SVD_TRT_ARGUMENT_ERROR);
  options.latents = nullptr, options.latents_count = 0, options.frames_on_device = 1;
  CHECK(svd_trt_stream_open(open.pipeline, &open.picture, 1, nullptr, &options, &stream) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(contains(svd_trt_last_error(), "frames_on_device needs a GPU provider"));
}

TEST_CASE("providers that are not there") {
  const auto opened = [](const char *provider, const char *library, int32_t device, int32_t threads, void *stream) {
    svd_trt_open_options options;
    svd_trt_open_options_init(&options, sizeof options);
    options.provider = provider, options.provider_library = library, options.device = device, options.threads = threads;
    options.cuda_stream = stream;
    svd_trt_pipeline *pipeline = nullptr;
    const svd_trt_status status = svd_trt_pipeline_open(bundle_path().c_str(), &options, &pipeline);
    CHECK(pipeline == nullptr);
    return status;
  };
  int variable = 0;
  CHECK(opened("rocm", nullptr, 0, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("", nullptr, 0, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("cpu", nullptr, -1, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("cpu", nullptr, 0, -1, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("cpu", nullptr, 0, 0, &variable) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("cpu", "x.so", 0, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("tensorrt-rtx", nullptr, 0, 0, nullptr) == SVD_TRT_ARGUMENT_ERROR);
  CHECK(opened("tensorrt-rtx", "/nowhere.so", 0, 0, nullptr) == SVD_TRT_BACKEND_ERROR);
}

TEST_CASE("bundles that are missing, damaged or of another schema") {
  svd_trt_pipeline *pipeline = nullptr;
  CHECK(svd_trt_pipeline_open("/nowhere/at/all", nullptr, &pipeline) == SVD_TRT_BUNDLE_ERROR);
  CHECK(contains(svd_trt_last_error(), "there is no bundle at /nowhere/at/all; make one with"));
  CHECK(svd_trt_pipeline_open("", nullptr, &pipeline) == SVD_TRT_BUNDLE_ERROR);
  CHECK(svd_trt_pipeline_open(fs::temp_directory_path().c_str(), nullptr, &pipeline) == SVD_TRT_BUNDLE_ERROR);
  CHECK(contains(svd_trt_last_error(), "is not a bundle (it has no manifest.json)"));
  SUBCASE("another schema") {
    const Copy copy;
    copy.replace("manifest.json", "\"schema_version\": 4", "\"schema_version\": 5");
    CHECK(contains(copy.refused(), "was written by a newer svd-trt (schema 5, this library reads 4)"));
    copy.replace("manifest.json", "\"schema_version\": 5", "\"schema_version\": 3");
    CHECK(contains(copy.refused(), "was written by an older svd-trt"));
  }
  SUBCASE("an altered manifest") {
    const Copy copy;
    copy.replace("manifest.json", "\"rho\": 7", "\"rho\": 6");
    CHECK(contains(copy.refused(), "manifest.json was altered since it was built"));
    fs::remove(copy.path / "manifest.json.sha256");
    CHECK(contains(copy.refused(), "was altered"));
  }
  SUBCASE("a manifest that is cut short or too large") {
    const Copy copy;
    fs::resize_file(copy.path / "manifest.json", 100);
    CHECK(contains(copy.refused(), "cannot be read"));
    fs::resize_file(copy.path / "manifest.json", uintmax_t{1} << 33); // sparse
    CHECK(contains(copy.refused(), "too large"));
  }
  SUBCASE("files that are altered, cut short or missing") {
    const Copy copy;
    const fs::path graph = copy.path / "onnx" / "denoiser.onnx";
    std::fstream file(graph, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(100);
    file.put('X').put('Y');
    file.close();
    CHECK(contains(copy.refused(), "denoiser.onnx was altered since it was built"));
    fs::resize_file(graph, fs::file_size(graph) - 1);
    CHECK(contains(copy.refused(false), "denoiser.onnx is truncated or altered"));
    fs::remove(graph);
    CHECK(contains(copy.refused(false), "denoiser.onnx is missing"));
  }
}

TEST_CASE("an altered file that nobody verified is ONNX Runtime's error") {
  const Copy copy;
  const fs::path graph = copy.path / "onnx" / "image_encoder.onnx";
  const uintmax_t size = fs::file_size(graph);
  fs::resize_file(graph, 0);
  fs::resize_file(graph, size);
  svd_trt::OpenOptions options;
  options.verify = false;
  svd_trt::Pipeline pipeline(copy.path.u8string(), options);
  const TestPicture picture = make_picture(40, 30);
  svd_trt::Stream stream = pipeline.stream(picture.view());
  svd_trt::Frame frame{};
  CHECK_THROWS_AS(stream.next(frame), svd_trt::Error);
  try {
    stream.next(frame);
    FAIL("it ended");
  } catch (const svd_trt::Error &error) {
    CHECK(error.status() == SVD_TRT_BACKEND_ERROR);
  }
}
