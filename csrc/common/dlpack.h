// SPDX-License-Identifier: Apache-2.0
// The part of the DLPack 1.x C ABI that a consumer and maker of tensors needs. Field order and widths follow
// the DLPack specification; nothing of torch is included, so one build serves every torch that offers the
// exchange API.
#pragma once

#include <cstdint>

namespace pfnas::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
constexpr const char* kExchangeAttribute = "__dlpack_c_exchange_api__";

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;    // [ndim]
  std::int64_t* strides;  // [ndim], in elements
  std::uint64_t byte_offset;
};

// A tensor with an owner: whoever holds it calls the deleter once.
struct ManagedTensorVersioned {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensorVersioned* self);
  std::uint64_t flags;
  Tensor tensor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* prev_api;
};

struct ExchangeApi {
  ExchangeApiHeader header;
  int (*managed_tensor_allocator)(Tensor* prototype, ManagedTensorVersioned** out, void* error_context,
                                  void (*set_error)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object)(void* py_object, ManagedTensorVersioned** out);
  int (*managed_tensor_to_py_object)(ManagedTensorVersioned* tensor, void** out_py_object);
  int (*tensor_from_py_object)(void* py_object, Tensor* out);  // borrowed view; may be null
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out_stream);
};

static_assert(sizeof(Tensor) == 48 && sizeof(ExchangeApiHeader) == 16 && sizeof(ManagedTensorVersioned) == 80,
              "layout differs from the DLPack ABI");

}  // namespace pfnas::dlpack
