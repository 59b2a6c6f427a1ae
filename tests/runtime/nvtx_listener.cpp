// A tool that NVTX loads through NVTX_INJECTION64_PATH. It writes a line to $NVTX_LOG for each range of a domain:
// "thread + domain name" when the range begins, "thread - domain" when it ends. The declarations are those parts of
// NVTX's binary interface that the tool needs.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unistd.h>
#include <sys/syscall.h>

namespace {

constexpr uint32_t kCallbackTable = 1;
constexpr int kModuleCore2 = 5;
enum Callback { kRangePush = 4, kRangePop = 5, kRegisterString = 10, kDomainCreate = 12 };
enum MessageType { kAscii = 1, kRegistered = 3 };

struct Attributes {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const char *message;  // registered strings are copies made here, so both kinds of message are text
};

using Slots = void (***)();
struct CallbackTable {
    size_t size;
    int (*slots_of)(int module, Slots *slots, unsigned *count);
};

std::mutex mutex;

void write(const char *sign, void *domain, const char *name) {
    std::lock_guard<std::mutex> lock(mutex);
    if (FILE *log = std::fopen(std::getenv("NVTX_LOG"), "a")) {
        std::fprintf(log, "%ld %s %s %s\n", syscall(SYS_gettid), sign, domain ? static_cast<char *>(domain) : "default", name);
        std::fclose(log);
    }
}

void *create_domain(const char *name) { return strdup(name); }
void *register_string(void *, const char *text) { return strdup(text); }

int push(void *domain, const Attributes *range) {
    bool text = range->message_type == kAscii || range->message_type == kRegistered;
    write("+", domain, text ? range->message : "?");
    return 0;
}

int pop(void *domain) {
    write("-", domain, "");
    return 0;
}

}  // namespace

extern "C" int InitializeInjectionNvtx2(const void *(*table_of)(uint32_t)) {
    auto table = static_cast<const CallbackTable *>(table_of(kCallbackTable));
    Slots slots = nullptr;
    unsigned count = 0;
    if (table == nullptr || !table->slots_of(kModuleCore2, &slots, &count) || count <= kDomainCreate) return 0;
    *slots[kRangePush] = reinterpret_cast<void (*)()>(push);
    *slots[kRangePop] = reinterpret_cast<void (*)()>(pop);
    *slots[kRegisterString] = reinterpret_cast<void (*)()>(register_string);
    *slots[kDomainCreate] = reinterpret_cast<void (*)()>(create_domain);
    return 1;
}
