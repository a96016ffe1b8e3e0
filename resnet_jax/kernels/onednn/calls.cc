// oneDNN's convolutions and products as custom calls of XLA on CPUs; `__init__.py`
// builds and calls them.

#include <cstdint>
#include <exception>
#include <functional>

#include "convolution.h"
#include "product.h"
#include "values.h"

namespace {

using namespace resnet_jax;

// Runs a function and makes an exception the error that XLA reports.
ffi::Error AsError(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, error.what());
  }
  return ffi::Error::Success();
}

ffi::Error Convolve(ffi::ThreadPool pool, int64_t direction,
                    ffi::Span<const int64_t> geometry, ffi::AnyBuffer left,
                    ffi::AnyBuffer right, ffi::Result<ffi::AnyBuffer> out) {
  return AsError([&] {
    RunConvolution(pool, static_cast<Direction>(direction),
                   Numbers(geometry.begin(), geometry.end()), left, right, *out);
  });
}

ffi::Error Multiply(ffi::ThreadPool pool, int64_t left_axis, int64_t right_axis,
                    ffi::AnyBuffer left, ffi::AnyBuffer right,
                    ffi::Result<ffi::AnyBuffer> out) {
  return AsError([&] { RunProduct(pool, left_axis, right_axis, left, right, *out); });
}

}  // namespace

// Returns whether bfloat16 is multiplied as float32.
extern "C" int ResnetJaxWidens() { return Widens(); }

// Returns whether bfloat16 is multiplied by Intel's AMX.
extern "C" int ResnetJaxHasAmx() { return HasAmx(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResnetJaxConvolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("direction")
                                  .Attr<ffi::Span<const int64_t>>("geometry")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ResnetJaxMultiply, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("left_axis")
                                  .Attr<int64_t>("right_axis")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
