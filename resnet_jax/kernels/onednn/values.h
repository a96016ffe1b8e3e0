// The numbers that oneDNN reads and writes: XLA's buffers, or float32 copies of those
// of bfloat16.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

#if DNNL_VERSION_MAJOR != 3 || DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP
#error "needs oneDNN 3 with OpenMP"
#endif

namespace resnet_jax {

using dnnl::memory;
using Numbers = std::vector<int64_t>;
using Type = memory::data_type;

inline const dnnl::engine& Cpu() {
  static const dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

// Returns the plan of a key, and makes it at the first call.
template <typename Plan>
const Plan& Kept(const std::vector<Numbers>& key, const std::function<Plan()>& make) {
  static std::mutex mutex;
  static auto& plans = *new std::map<std::vector<Numbers>, Plan>;
  const OneThread thread;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(key);
  if (found == plans.end()) found = plans.emplace(key, make()).first;
  return found->second;
}

// Types.

// Returns whether oneDNN uses a set of the CPU's instructions.
inline bool Has(dnnl::cpu_isa instructions) {
  const auto all = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  const auto some = static_cast<unsigned>(instructions);
  return (all & some) == some;
}

inline bool HasAmx() {
  static const bool has = Has(dnnl::cpu_isa::avx512_core_amx);
  return has;
}

// Returns whether products of bfloat16 are faster in float32, even with conversions in
// both directions. They are on CPUs without instructions for bfloat16, and on Intel's
// CPUs without AMX.
inline bool Widens() {
  static const bool widens =
      !HasAmx() && (!Has(dnnl::cpu_isa::avx512_core_bf16) || __builtin_cpu_is("intel"));
  return widens;
}

// Returns the type in which numbers of a type are multiplied.
inline Type Multiplied(Type type) { return Widens() ? Type::f32 : type; }

// Compiles a function for several sets of vector instructions.
#define FOR_EVERY_CPU \
  __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))

// Converts bfloat16 to float32.
FOR_EVERY_CPU static void Widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

// Rounds to the nearest bfloat16, ties to even. NaNs remain NaNs.
inline uint16_t Rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1);
  const bool number = (bits & 0x7fffffff) <= 0x7f800000;
  return (number ? nearest : bits | 0x400000) >> 16;
}

// Converts float32 to bfloat16.
FOR_EVERY_CPU static void Narrow(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Rounded(from[i]);
}

// Contiguous numbers in memory of XLA, or in memory of their own.
class Values {
 public:
  explicit Values(const ffi::AnyBuffer& x)
      : type(x.element_type() == ffi::DataType::BF16 ? Type::bf16 : Type::f32),
        count(x.element_count()),
        data_(static_cast<char*>(x.untyped_data())) {}

  // Allocates memory for as many numbers of a type, unless `x` has that type.
  Values(const Values& x, Type type) : Values(x) {
    if (type == x.type) return;
    this->type = type;
    own_ = memory({{count}, type, memory::format_tag::a}, Cpu());
    data_ = static_cast<char*>(own_.get_data_handle());
  }

  char* At(int64_t begin) const { return data_ + begin * memory::data_type_size(type); }

  Type type;
  int64_t count;

 private:
  char* data_;
  memory own_;
};

// Converts numbers to the other type.
inline void Convert(const void* from, Type from_type, void* to, int64_t count) {
  if (from_type == Type::bf16) {
    Widen(static_cast<const uint16_t*>(from), static_cast<float*>(to), count);
  } else {
    Narrow(static_cast<const float*>(from), static_cast<uint16_t*>(to), count);
  }
}

// Converts all numbers on all threads, if the types differ.
inline void Convert(ffi::ThreadPool& pool, const Values& from, const Values& to) {
  if (from.type == to.type) return;
  const Division some(to.count, Threads(pool), 64);
  Share(pool, some.count, [&](int64_t i) {
    const int64_t begin = i * some.some;
    Convert(from.At(begin), from.type, to.At(begin),
            std::min(some.some, some.length - begin));
  });
}

// Returns the numbers in a type: `x` itself, or a converted copy.
inline Values As(ffi::ThreadPool& pool, const Values& x, Type type) {
  const Values converted(x, type);
  Convert(pool, x, converted);
  return converted;
}

// A contiguous part of `all` as oneDNN takes it: in place, or in memory of its own if
// the type differs. `Room` is the memory to write to, `Read` fills it with the numbers,
// and `Write` converts what was written back.
class Slice {
 public:
  Slice(const memory::desc& desc, const Values& all, int64_t begin)
      : stored_(all.At(begin)),
        type_(all.type),
        in_place_(desc.get_data_type() == all.type),
        held_(in_place_ ? memory(desc, Cpu(), stored_) : memory(desc, Cpu())) {}

  const memory& Room() const { return held_; }
  const memory& Read() const {
    if (!in_place_) Convert(stored_, type_, held_.get_data_handle(), Count());
    return held_;
  }
  void Write() const {
    if (!in_place_) Convert(held_.get_data_handle(), Type::f32, stored_, Count());
  }

 private:
  int64_t Count() const { return held_.get_desc().get_size() / sizeof(float); }

  void* stored_;
  Type type_;
  bool in_place_;
  memory held_;
};

// Returns into how many parts `numbers` numbers are divided, if each part also needs
// the same `others` numbers. Numbers that are converted to float32 are divided so that
// a part fits a core's cache of 2 MiB, or is twice as large as the others.
inline int64_t PartsOf(Type type, int64_t threads, int64_t numbers, int64_t others) {
  if (Multiplied(type) == type) return threads;
  const int64_t some =
      threads * std::max<int64_t>((2 << 20) / sizeof(float), 2 * others);
  return threads * ((numbers + some - 1) / some);
}

// Adds the parts of a sum to the first one, always in the same order.
inline void Add(ffi::ThreadPool& pool, const std::vector<memory>& parts) {
  std::vector<float*> all;
  for (const memory& part : parts) {
    all.push_back(static_cast<float*>(part.get_data_handle()));
  }
  const Division size(parts[0].get_desc().get_size() / sizeof(float), Threads(pool));
  Share(pool, size.count, [&](int64_t i) {
    const int64_t end = std::min(size.length, (i + 1) * size.some);
    for (size_t part = 1; part < all.size(); ++part) {
      for (int64_t j = i * size.some; j < end; ++j) all[0][j] += all[part][j];
    }
  });
}

}  // namespace resnet_jax
