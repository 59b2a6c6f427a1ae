// Bundles that are missing, damaged or of another version give a code and a message.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>

#include "bundle.hpp"

namespace fs = std::filesystem;

namespace {

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
  SUBCASE("an altered manifest that would be refused for its content too") {
    const Copy copy;
    copy.replace("manifest.json", "\"image_mean\"", "\"mean\"");
    CHECK(contains(copy.refused(), "manifest.json was altered since it was built"));
  }
  SUBCASE("a folder in the manifest's place") {
    const Copy copy;
    fs::remove(copy.path / "manifest.json");
    fs::create_directory(copy.path / "manifest.json");
    CHECK(contains(copy.refused(), "manifest.json cannot be read (Is a directory)"));
  }
  SUBCASE("a manifest that is nested too deeply") {
    const Copy copy;
    std::ofstream(copy.path / "manifest.json")
        << R"({"schema_version": 4, "model": )" << std::string(1000000, '[') << std::string(1000000, ']') << "}";
    CHECK(contains(copy.refused(), "nested more than 64 deep"));
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
