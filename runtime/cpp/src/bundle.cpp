#include "bundle.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <fstream>
#include <new>
#include <system_error>
#include <thread>

#include "error.hpp"
#include "sha256.hpp"

namespace svd_trt::detail {
namespace {

namespace fs = std::filesystem;

constexpr const char *kManifest = "manifest.json";
constexpr const char *kChecksum = "manifest.json.sha256";
constexpr const char *kMake = "; make one with `svd-trt build MODEL -o BUNDLE`";
constexpr const char *kAgain = "; run `svd-trt build` again to repair it";
constexpr uintmax_t kLargestManifest = 64 << 20;

std::string no_bundle(const fs::path &folder) {
  std::error_code ignored;
  const std::string name = folder.u8string();
  if (!fs::exists(folder, ignored)) return "there is no bundle at " + name + kMake;
  if (!fs::is_directory(folder, ignored)) return name + " is a file, not a bundle" + kMake;
  if (fs::exists(folder / "model_index.json", ignored))
    return name + " is a checkpoint, not a bundle: svd-trt build " + name + " -o BUNDLE";
  return name + " is not a bundle (it has no " + kManifest + ")" + kMake;
}

std::string read_manifest(const fs::path &folder) {
  const fs::path path = folder / kManifest;
  std::error_code error;
  const uintmax_t size = fs::file_size(path, error);
  if (error == std::errc::no_such_file_or_directory || error == std::errc::not_a_directory)
    throw bundle_error(no_bundle(folder));
  if (error) throw bundle_error(path.u8string() + " cannot be read (" + error.message() + ")" + kAgain);
  if (size > kLargestManifest) throw bundle_error(path.u8string() + " is too large for a manifest" + kAgain);
  return read_file(path);
}

// What was recorded when the bundle was built; empty if it cannot be read.
std::string recorded_checksum(const fs::path &folder) {
  std::string recorded;
  std::ifstream(folder / kChecksum) >> recorded;
  return recorded;
}

// What is wrong with a file; empty if nothing is.
std::string problem(const fs::path &folder, const File &file, bool verify) {
  const fs::path path = folder / fs::u8path(file.path);
  try {
    const uintmax_t size = fs::file_size(path);
    if (size != file.size)
      return path.u8string() + " is truncated or altered (" + std::to_string(size) + " bytes, " +
             std::to_string(file.size) + " were written)";
    if (verify && sha256_of_file(path) != file.sha256) return path.u8string() + " was altered since it was built";
  } catch (const std::system_error &error) {
    if (error.code() == std::errc::no_such_file_or_directory) return path.u8string() + " is missing";
    return path.u8string() + " cannot be read (" + error.code().message() + ")";
  } catch (const std::bad_alloc &) { // an exception must not leave a thread
    return path.u8string() + " cannot be read (out of memory)";
  }
  return "";
}

// Threads hash files in parallel, the largest files first. The first problem ends the work.
void check_files(const fs::path &folder, std::vector<File> files, bool verify) {
  std::sort(files.begin(), files.end(), [](const File &a, const File &b) { return a.size > b.size; });
  std::vector<std::string> problems(files.size());
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    for (size_t i = next++; i < files.size() && !failed; i = next++) {
      problems[i] = problem(folder, files[i], verify);
      if (!problems[i].empty()) failed = true;
    }
  };
  std::vector<std::thread> threads;
  const size_t helpers =
      verify ? std::min<size_t>({4, files.size(), std::max(1u, std::thread::hardware_concurrency())}) - 1 : 0;
  try {
    for (size_t i = 0; i < helpers; ++i) threads.emplace_back(work);
  } catch (const std::system_error &) { // no more threads: this one does the rest
  }
  work();
  for (std::thread &thread : threads) thread.join();
  for (const std::string &found : problems)
    if (!found.empty()) throw bundle_error(found + kAgain);
}

} // namespace

std::string read_file(const fs::path &path) {
  std::ifstream file(path, std::ios::binary);
  const std::error_code error(errno, std::generic_category());
  if (!file) throw bundle_error(path.u8string() + " cannot be read (" + error.message() + ")");
  try {
    return {std::istreambuf_iterator<char>(file), {}};
  } catch (const std::ios_base::failure &failure) { // it is a folder, or the disk failed
    throw bundle_error(path.u8string() + " cannot be read (" + failure.code().message() + ")");
  }
}

fs::path Bundle::graph(const std::string &network) const {
  return path / fs::u8path(manifest.networks.at(network).graph.path);
}

Bundle open_bundle(const fs::path &path, bool verify) {
  Bundle bundle{path, read_manifest(path), {}};
  bundle.manifest = parse_manifest(bundle.text, path / kManifest, recorded_checksum(path));
  if (bundle.manifest.files.empty()) throw bundle_error((path / kManifest).u8string() + " names no files" + kAgain);
  check_files(path, bundle.manifest.files, verify);
  return bundle;
}

} // namespace svd_trt::detail
