// Parts of the library by themselves, with a bundle.
#include <doctest/doctest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "error.hpp"
#include "golden.hpp"
#include "pipeline.hpp"

using namespace svd_trt::detail;
using Json = nlohmann::json;

namespace {

// The bundle's manifest after a change.
template <class Change> Json manifest_with(Change change) {
  Json manifest = Json::parse(read_file(std::filesystem::u8path(bundle_path()) / "manifest.json"));
  change(manifest);
  return manifest;
}

template <class Change> std::string refusal(Change change) {
  try {
    parse_manifest(manifest_with(change).dump(), "b/manifest.json");
  } catch (const Failure &failure) {
    CHECK(failure.status == SVD_TRT_BUNDLE_ERROR);
    return failure.what();
  }
  return "";
}

std::shared_ptr<Stream> open_stream(Pipeline &pipeline) {
  svd_trt_arguments arguments = default_arguments(pipeline.manifest());
  arguments.num_inference_steps = 1, arguments.num_frames = 3;
  const TestPicture picture = make_picture(40, 30);
  return pipeline.open(resolve(arguments, pipeline.manifest(), 1), {{picture.width, picture.height, picture.pixels}},
                       {}, false, {});
}

// What the self-test says of golden values after a change.
template <class Change> std::map<std::string, double> differences(Change change) {
  const DeviceOptions device;
  auto shared = std::make_shared<Shared>();
  shared->bundle = open_bundle(std::filesystem::u8path(bundle_path()), false);
  const std::filesystem::path path = shared->bundle.path / shared->bundle.manifest.golden_values->path;
  Json values = Json::parse(read_file(path));
  change(values);
  const Picture picture = read_ppm(read_file(shared->bundle.path / shared->bundle.manifest.golden_picture->path));
  const std::string frames = read_file(shared->bundle.path / shared->bundle.manifest.golden_frames->path);
  shared->networks = std::make_unique<Networks>(shared->bundle, device);
  std::map<std::string, double> found;
  compare_golden(values.dump(), picture, frames, shared,
                 [&](const std::string &name, double difference, double) { found[name] = difference; });
  return found;
}

} // namespace

TEST_CASE("a manifest whose noise has another shape than the loop indexes is refused") {
  CHECK(refusal([](Json &) {}).empty());
  const auto shape = [](size_t draw, const Json &value) {
    return refusal([&](Json &manifest) { manifest["host"]["noise"]["draws"][draw]["shape"] = value; });
  };
  const std::string message = "its draws of noise are not those that this library knows; update it";
  CHECK(shape(0, {1}) == message);
  CHECK(shape(0, Json::array()) == message);
  CHECK(shape(1, Json::array()) == message);
  CHECK(shape(1, {1, 3, 4, 16, 16}) == message);
  CHECK(refusal([](Json &m) { m["host"]["noise"]["draws"].erase(0); }) == message);
  CHECK(refusal([](Json &m) { m["model"]["latent_channels"] = 3; }) == message);
}

TEST_CASE("a manifest without the tensors that the loop binds is refused") {
  for (const char *network : {"image_encoder", "vae_encoder", "denoiser", "vae_decoder"})
    for (const char *side : {"inputs", "outputs"}) {
      const std::string message = refusal([&](Json &m) { m["networks"][network]["spec"][side] = Json::array(); });
      CHECK(message.rfind(std::string("its ") + network + " has no ", 0) == 0);
    }
  CHECK(refusal([](Json &m) { m["networks"]["denoiser"]["spec"]["inputs"][7]["name"] = "x"; }) ==
        "its denoiser has no input coefficients at place 7");
}

TEST_CASE("a manifest whose sizes do not fit the VAE is refused") {
  CHECK(refusal([](Json &m) { m["host"]["symbols"]["height"]["multiple"] = 1; }) ==
        "the multiples of its height do not fit its VAE");
  CHECK(refusal([](Json &m) { m["host"]["symbols"].erase("width"); }) ==
        "the multiples of its width do not fit its VAE");
}

TEST_CASE("the checksum is compared before the rest of a manifest is read") {
  const std::string text = R"({"schema_version": 4, "model": 5})";
  CHECK_THROWS_WITH(parse_manifest(text, "b/manifest.json", "0000"),
                    "b/manifest.json was altered since it was built; run `svd-trt build` again to repair it");
}

TEST_CASE("a stream that has ended keeps neither networks nor frames, although it is open") {
  for (const bool fails : {false, true}) {
    auto pipeline = std::make_unique<Pipeline>(bundle_path(), DeviceOptions{}, false);
    const std::shared_ptr<Stream> stream = open_stream(*pipeline);
    const std::weak_ptr<const Shared> shared = pipeline->shared();
    FrameView frame{};
    REQUIRE(stream->generation->next(frame));
    if (fails) {
      pipeline->cancel("enough");
      CHECK_THROWS_WITH(stream->generation->next(frame), "enough");
    } else {
      while (stream->generation->next(frame)) {
      }
    }
    pipeline.reset();
    CHECK(shared.expired());
    CHECK(stream->generation->settings().num_frames == 3); // what is asked after the end
    if (!fails) CHECK_THROWS_WITH(stream->generation->next(frame), "the pipeline was closed");
  }
}

TEST_CASE("the end of a stream stays its end") {
  Pipeline pipeline(bundle_path(), DeviceOptions{}, false);
  const std::shared_ptr<Stream> stream = open_stream(pipeline);
  FrameView frame{};
  int frames = 0;
  while (stream->generation->next(frame)) ++frames;
  CHECK(frames == 3);
  CHECK(!stream->generation->next(frame));
  std::vector<float> latents(stream->generation->latents_count());
  CHECK_THROWS_WITH(stream->generation->latents(latents.data()),
                    "the stream has already handed out frames; open another one for latents");
}

TEST_CASE("golden values that are empty or not numbers do not pass") {
  CHECK(differences([](Json &) {})["noise"] < 1e-5);
  CHECK(std::isinf(differences([](Json &v) { v["noise"] = Json::array(); })["noise"]));
  CHECK(std::isinf(differences([](Json &v) { v["schedules"] = Json::array(); })["schedule"]));
  CHECK(std::isinf(differences([](Json &v) { v["pixels"]["samples"] = Json::array(); })["image encoder's input"]));
}

TEST_CASE("the golden video is decoded with its own chunks") {
  CHECK(differences([](Json &) {})["frames of a video"] <= 2);
  // One chunk for each frame: the decoder mixes the frames of a chunk.
  CHECK(differences([](Json &v) { v["video"]["arguments"]["decode_chunk_size"] = 1; })["frames of a video"] > 2);
}

TEST_CASE("what is registered with ONNX Runtime is forgotten with its environment") {
  std::shared_ptr<Environment> first = environment();
  REQUIRE(first->plugin.empty());
  first->plugin = "plugin.so";
  CHECK(environment()->plugin == "plugin.so"); // the same one
  first.reset();
  CHECK(environment()->plugin.empty());
}
