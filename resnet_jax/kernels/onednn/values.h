// What oneDNN is given: numbers as XLA has them, or, of bfloat16, as float32.

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

// What was made for a key, now or before.
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

inline bool Has(dnnl::cpu_isa instructions) {
  const auto all = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  const auto some = static_cast<unsigned>(instructions);
  return (all & some) == some;
}

inline bool HasAmx() {
  static const bool has = Has(dnnl::cpu_isa::avx512_core_amx);
  return has;
}

// Whether products of bfloat16 are faster as those of float32, even with the way there
// and back: without instructions for them, and on Intel's CPUs also without AMX.
inline bool Widens() {
  static const bool widens =
      !HasAmx() && (!Has(dnnl::cpu_isa::avx512_core_bf16) || __builtin_cpu_is("intel"));
  return widens;
}

// The type in which numbers of a type are multiplied.
inline Type Multiplied(Type type) { return Widens() ? Type::f32 : type; }

#define FOR_EVERY_CPU \
  __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))

FOR_EVERY_CPU static void Widen(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

// As bfloat16: the nearest, of two the even one; what is not a number stays so.
inline uint16_t Rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1);
  const bool number = (bits & 0x7fffffff) <= 0x7f800000;
  return (number ? nearest : bits | 0x400000) >> 16;
}

FOR_EVERY_CPU static void Narrow(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Rounded(from[i]);
}

// Numbers one behind the other.
class Values {
 public:
  explicit Values(const ffi::AnyBuffer& x)
      : type(x.element_type() == ffi::DataType::BF16 ? Type::bf16 : Type::f32),
        count(x.element_count()),
        data_(static_cast<char*>(x.untyped_data())) {}

  // Of another type have room of their own.
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

inline void Convert(const void* from, Type from_type, void* to, int64_t count) {
  if (from_type == Type::bf16) {
    Widen(static_cast<const uint16_t*>(from), static_cast<float*>(to), count);
  } else {
    Narrow(static_cast<const float*>(from), static_cast<uint16_t*>(to), count);
  }
}

// Brings all numbers to where they have another type, if they are not there.
inline void Convert(ffi::ThreadPool& pool, const Values& from, const Values& to) {
  if (from.type == to.type) return;
  const Division some(to.count, Threads(pool), 64);
  Share(pool, some.count, [&](int64_t i) {
    const int64_t begin = i * some.some;
    Convert(from.At(begin), from.type, to.At(begin),
            std::min(some.some, some.length - begin));
  });
}

// Numbers in a type.
inline Values As(ffi::ThreadPool& pool, const Values& x, Type type) {
  const Values found(x, type);
  Convert(pool, x, found);
  return found;
}

// Some numbers of all, without gaps, as oneDNN takes them: in place, or, of another
// type, with room of their own.
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

// How many parts of some numbers of a type, of which each needs the same others, too:
// brought to float32, a part should fit a core's cache of 2 MiB, or outweigh the
// others.
inline int64_t PartsOf(Type type, int64_t threads, int64_t numbers, int64_t others) {
  if (Multiplied(type) == type) return threads;
  const int64_t some =
      threads * std::max<int64_t>((2 << 20) / sizeof(float), 2 * others);
  return threads * ((numbers + some - 1) / some);
}

// Adds parts of a sum to the first one, always in their order.
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
