#include "manifest.hpp"

#include <algorithm>

#include "error.hpp"
#include "json.hpp"
#include "sha256.hpp"
#include "text.hpp"

namespace svd_trt::detail {
namespace {

using Json = nlohmann::json;

constexpr const char *kRepair = "; run `svd-trt build` again to repair it";
const std::array<std::string, 7> kCoefficientNames{
    "c_in", "c_noise", "c_skip", "c_out", "latents_weight", "denoised_weight", "previous_denoised_weight"};
const std::array<std::string, 4> kNetworks{"image_encoder", "vae_encoder", "denoiser", "vae_decoder"};
const std::string kShallow = "shallow_denoiser"; // if the bundle has deep_channels
const std::map<std::string, Type> kTypes{
    {"float32", Type::float32}, {"float16", Type::float16}, {"uint8", Type::uint8}};
// Arguments that the loop uses; a bundle that lacks one is not usable.
const std::array<std::string, 13> kArguments{"num_frames",
                                             "num_inference_steps",
                                             "sigmas",
                                             "min_guidance_scale",
                                             "max_guidance_scale",
                                             "fps",
                                             "motion_bucket_id",
                                             "noise_aug_strength",
                                             "decode_chunk_size",
                                             "num_videos_per_prompt",
                                             "seed",
                                             "height",
                                             "width"};

Range range(const Json &json) { return {json.at("min"), json.at("max")}; }

std::vector<Axis> shape(const Json &json) {
  std::vector<Axis> axes;
  for (const Json &axis : json) {
    Axis found{};
    if (axis.is_object()) {
      found.symbol = axis.at("symbol");
      found.number = axis.value("divisor", int64_t{1});
    } else {
      found.number = axis;
    }
    if (found.number < 1) throw bundle_error("an axis has the number " + std::to_string(found.number));
    axes.push_back(std::move(found));
  }
  return axes;
}

std::vector<Tensor> tensors(const Json &json) {
  std::vector<Tensor> found;
  for (const Json &tensor : json) {
    const std::string type = tensor.at("dtype");
    const auto known = kTypes.find(type);
    if (known == kTypes.end()) throw bundle_error("a tensor has the type " + echoed(type));
    found.push_back({tensor.at("name"), known->second, shape(tensor.at("shape"))});
  }
  return found;
}

File file(const Json &json) {
  File found{json.at("path"), json.at("sha256"), json.at("size")};
  const std::filesystem::path path = std::filesystem::u8path(found.path);
  const bool leaves = path.empty() || path.is_absolute() || std::find(path.begin(), path.end(), "..") != path.end();
  if (leaves) throw bundle_error("it names files outside the bundle: " + echoed(found.path));
  return found;
}

// Every file entry, wherever it is.
void collect_files(const Json &json, std::vector<File> &files) {
  if (json.is_object() && json.contains("path") && json.contains("sha256") && json.contains("size"))
    files.push_back(file(json));
  if (json.is_structured())
    for (const Json &item : json) collect_files(item, files);
}

Argument argument(const Json &json) {
  Argument found{json.at("kind"), {}, {}, {}, {}, json.value("choices", std::vector<std::string>{})};
  const Json &value = json.at("default");
  if (value.is_number()) found.default_number = value.get<double>();
  if (value.is_string()) found.default_text = value;
  if (json.at("min").is_number()) found.min = json.at("min").get<double>();
  if (json.at("max").is_number()) found.max = json.at("max").get<double>();
  return found;
}

void require(const std::string &what, const std::string &name, std::initializer_list<const char *> known) {
  if (std::find(known.begin(), known.end(), name) == known.end())
    throw bundle_error("its " + what + " is " + echoed(name) + ", which this library does not know; update it");
}

std::optional<double> number_or_null(const Json &json) {
  return json.is_null() ? std::nullopt : std::optional<double>(json.get<double>());
}

Sampler sampler(const Json &json) {
  Sampler found{number_or_null(json.at("sigma_min")),
                number_or_null(json.at("sigma_max")),
                json.at("rho"),
                json.at("timestep_spacing"),
                json.value("schedule", std::string("karras")),
                json.contains("final_sigma") ? number_or_null(json["final_sigma"]) : 0.0,
                json.value("solver", std::string("euler")),
                json.value("steps_offset", int64_t{0}),
                json.value("training_sigmas", std::vector<double>{})};
  require("noise schedule", found.schedule, {"karras", "exponential", "training"});
  require("sampler", found.solver, {"euler", "dpmpp-2m"});
  const bool needs_levels = found.schedule == "training" || !found.sigma_min || !found.sigma_max;
  if (needs_levels && found.training_sigmas.empty()) throw bundle_error("its noise schedule has no levels of training");
  return found;
}

void require_known(const Json &host) {
  require("noise generator", host.at("noise").at("generator"), {"torch-cpu-mt19937"});
  require("preparation of the picture", host.at("picture").at("pixels"), {"blur-bicubic-aligned"});
  require("preparation of the picture", host.at("picture").at("image"), {"lanczos3-across-first"});
  require("rule of the first noise", host.at("noise").at("initial_scale"), {"sigma", "sqrt(sigma^2 + 1)"});
  if (!std::equal(kCoefficientNames.begin(), kCoefficientNames.end(), host.at("coefficients").begin(),
                  host.at("coefficients").end()))
    throw bundle_error("its denoiser takes coefficients that this library does not know; update it");
}

void parse_host(const Json &host, Manifest &manifest) {
  require_known(host);
  for (const auto &[name, symbol] : host.at("symbols").items()) manifest.multiples[name] = symbol.at("multiple");
  for (const Json &condition : host.at("conditions"))
    manifest.conditions.push_back({condition.at("argument"), condition.at("add")});
  for (const Json &draw : host.at("noise").at("draws"))
    manifest.draws.push_back({draw.at("name"), shape(draw.at("shape")), draw.at("dtype") == "float16"});
  manifest.initial_scale = host.at("noise").at("initial_scale");
  const Json &guidance = host.at("guidance");
  manifest.first_frame_scale = guidance.at("first_frame"), manifest.last_frame_scale = guidance.at("last_frame");
  for (const Json &branch : guidance.at("branches"))
    manifest.branches.push_back({branch.at("conditioned"), branch.at("constant"), branch.at("factor")});
  manifest.guidance_off_up_to = guidance.at("off_up_to");
  manifest.image_noise = host.at("picture").at("image_noise");
  for (const auto &[name, described] : host.at("arguments").items()) manifest.arguments[name] = argument(described);
  for (const std::string &name : kArguments)
    if (!manifest.arguments.count(name)) throw bundle_error("it does not describe the argument " + name);
}

Manifest parse(const Json &json) {
  Manifest manifest{};
  collect_files(json, manifest.files);
  const Json &model = json.at("model");
  manifest.model = {model.at("latent_channels"), model.at("vae_scale_factor"), model.at("embed_dim"),
                    model.at("image_size"),      model.at("decoder_channels"), model.at("image_mean"),
                    model.at("image_std")};
  manifest.sampler = sampler(json.at("sampler"));
  for (const auto &[name, value] : json.at("ranges").items()) manifest.ranges[name] = range(value);
  const Json &graph = json.at("graph");
  std::vector<std::string> names(kNetworks.begin(), kNetworks.end());
  if (const Json channels = graph.value("deep_channels", Json()); !channels.is_null()) {
    manifest.deep_channels = channels.get<int64_t>();
    names.push_back(kShallow);
  }
  for (const std::string &name : names) {
    const Json &network = json.at("networks").at(name);
    const Json &spec = network.at("spec");
    manifest.networks[name] = {tensors(spec.at("inputs")), tensors(spec.at("outputs")),
                               file(network.at("onnx").at("graph"))};
  }
  manifest.only_onnxruntime = graph.value("operators", std::string("onnx")) == "onnxruntime";
  parse_host(json.at("host"), manifest);
  if (const Json &golden = json.at("golden"); golden.is_object()) {
    manifest.golden_picture = file(golden.at("picture")), manifest.golden_values = file(golden.at("values"));
    if (golden.at("frames").is_object()) manifest.golden_frames = file(golden.at("frames"));
  }
  return manifest;
}

void check_sizes(const Manifest &manifest) {
  const std::array<const char *, 7> symbols{"batch", "pictures", "branches", "frames", "chunk", "height", "width"};
  for (const char *symbol : symbols) {
    const auto found = manifest.ranges.find(symbol);
    if (found == manifest.ranges.end() || found->second.min < 1 || found->second.max < found->second.min ||
        found->second.max > 1 << 20)
      throw bundle_error(std::string("its range of ") + symbol + " is not a range");
  }
  const Model &m = manifest.model;
  for (const int64_t value : {m.latent_channels, m.vae_scale_factor, m.embed_dim, m.image_size, m.decoder_channels})
    if (value < 1 || value > 1 << 20) throw bundle_error("a size of its model is " + std::to_string(value));
  for (const char *side : {"height", "width"}) {
    const auto multiple = manifest.multiples.find(side);
    if (multiple == manifest.multiples.end() || multiple->second < 1 || multiple->second % m.vae_scale_factor != 0)
      throw bundle_error(std::string("the multiples of its ") + side + " do not fit its VAE");
  }
  if (const int64_t channels = manifest.deep_channels.value_or(1); channels < 1 || channels > 1 << 20)
    throw bundle_error("deep_channels is " + std::to_string(channels));
  if (manifest.branches.empty()) throw bundle_error("it has no guidance branches");
}

// The loop indexes noise by these shapes.
void check_draws(const Manifest &manifest) {
  const Model &m = manifest.model;
  const std::vector<Axis> image_noise{{"pictures", 1}, {"", 3}, {"height", 1}, {"width", 1}};
  const std::vector<Axis> latents{{"batch", 1},
                                  {"frames", 1},
                                  {"", m.latent_channels},
                                  {"height", m.vae_scale_factor},
                                  {"width", m.vae_scale_factor}};
  if (manifest.draws.size() != 2 || manifest.draws[0].name != "image_noise" || manifest.draws[1].name != "latents" ||
      manifest.draws[0].shape != image_noise || manifest.draws[1].shape != latents)
    throw bundle_error("its draws of noise are not those that this library knows; update it");
}

// The loop binds these tensors, those of the encoders and the decoder by their places.
void check_tensors(const Manifest &manifest) {
  const auto check = [&](const std::string &network, bool input, const std::vector<std::string> &wanted) {
    const Network &found = manifest.networks.at(network);
    const std::vector<Tensor> &tensors = input ? found.inputs : found.outputs;
    for (size_t i = 0; i < wanted.size(); ++i)
      if (i >= tensors.size() || tensors[i].name != wanted[i])
        throw bundle_error("its " + network + " has no " + (input ? "input " : "output ") + wanted[i] + " at place " +
                           std::to_string(i));
  };
  check("image_encoder", true, {"pixels"});
  check("image_encoder", false, {"image_embeds"});
  check("vae_encoder", true, {"image"});
  check("vae_encoder", false, {"image_latents"});
  check("denoiser", true,
        {"latents", "previous_denoised", "partial_denoised", "image_latents", "image_embeds", "added_time_ids",
         "guidance", "coefficients"});
  check("denoiser", false, {"next_latents", "denoised"});
  check("vae_decoder", true, {"latents"});
  check("vae_decoder", false, {"frames"});
}

void check_version(const Json &json, const std::filesystem::path &path) {
  const auto found = json.is_object() ? json.find("schema_version") : json.end();
  const Json version = json.is_object() && found != json.end() && found->is_number_integer() ? *found : Json();
  if (version.is_number_integer() && version == kSchema) return;
  const std::string where = path.parent_path().u8string();
  const std::string reads = "this library reads " + std::to_string(kSchema) + ")";
  if (version.is_number_integer() && version > kSchema)
    throw bundle_error(where + " was written by a newer svd-trt (schema " + version.dump() + ", " + reads +
                       "; update the library");
  if (version.is_number_integer() && version > 0)
    throw bundle_error(where + " was written by an older svd-trt (schema " + version.dump() + ", " + reads +
                       "; run `svd-trt build` again");
  throw bundle_error(path.u8string() + " has no schema version that this library reads" + kRepair);
}

} // namespace

std::vector<int64_t> resolved(const std::vector<Axis> &shape, const Sizes &sizes) {
  std::vector<int64_t> numbers;
  for (const Axis &axis : shape) {
    const auto found = sizes.find(axis.symbol);
    if (!axis.symbol.empty() && found == sizes.end())
      throw bundle_error("a tensor has the symbol " + echoed(axis.symbol) + ", which this library does not know");
    numbers.push_back(axis.symbol.empty() ? axis.number : found->second / axis.number);
  }
  return numbers;
}

Manifest parse_manifest(const std::string &text, const std::filesystem::path &path,
                        const std::optional<std::string> &sha256) {
  try {
    const Json json = parse_json(text);
    check_version(json, path);
    // Another schema may have another checksum, so only now.
    if (sha256 && *sha256 != sha256_of(text))
      throw bundle_error(path.u8string() + " was altered since it was built" + kRepair);
    try {
      Manifest manifest = parse(json);
      check_sizes(manifest);
      check_draws(manifest);
      check_tensors(manifest);
      return manifest;
    } catch (const Json::exception &error) {
      throw bundle_error(path.u8string() + " is not a bundle's manifest (" + error.what() + ")" + kRepair);
    }
  } catch (const Json::parse_error &error) {
    throw bundle_error(path.u8string() + " cannot be read (" + error.what() + ")" + kRepair);
  }
}

} // namespace svd_trt::detail
