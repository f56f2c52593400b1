// A libcuda whose device is this process's memory: what kvtransfer/cuda/libcuda.py calls, and kernels.cu run by threads.
//
// With WITH_CUDA_H the functions are checked against NVIDIA's declarations by the compiler. Nothing is asynchronous, but
// an event says so once before it is done.
#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#ifdef WITH_CUDA_H
#include <cuda.h>
#else
extern "C" {
typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st* CUcontext;
typedef struct CUmod_st* CUmodule;
typedef struct CUfunc_st* CUfunction;
typedef struct CUstream_st* CUstream;
typedef struct CUevent_st* CUevent;
typedef int CUdevice_attribute;
typedef int CUpointer_attribute;
struct CUuuid { char bytes[16]; };
struct CUipcMemHandle { char reserved[64]; };
}
#define CUDA_SUCCESS 0
#define CUDA_ERROR_INVALID_VALUE 1
#define CUDA_ERROR_INVALID_HANDLE 400
#define CUDA_ERROR_NOT_READY 600
#define CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE 10
#define CU_POINTER_ATTRIBUTE_RANGE_START_ADDR 11
#define CU_POINTER_ATTRIBUTE_RANGE_SIZE 12
#define CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR 75
#define cuMemAlloc cuMemAlloc_v2
#define cuMemFree cuMemFree_v2
#define cuMemAllocHost cuMemAllocHost_v2
#define cuMemcpyHtoDAsync cuMemcpyHtoDAsync_v2
#define cuMemcpyDtoHAsync cuMemcpyDtoHAsync_v2
#define cuStreamDestroy cuStreamDestroy_v2
#define cuEventDestroy cuEventDestroy_v2
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuDeviceGetUuid cuDeviceGetUuid_v2
#define cuIpcOpenMemHandle cuIpcOpenMemHandle_v2
#endif

namespace {

struct Index { unsigned x; };
thread_local Index threadIdx, blockIdx;
std::barrier<>* meeting;
void meet() { meeting->arrive_and_wait(); }
struct ulonglong2 { unsigned long long x, y; };
void atomicAdd(unsigned long long* sum, unsigned long long value) { *sum += value; }

}  // namespace

#define __global__
#define __device__
#define __shared__ static
#define __syncthreads meet
#include "kernels.cu"

namespace {

std::recursive_mutex mutex;  // drivers of several threads use it at the same time
std::map<CUdeviceptr, size_t> allocations;
std::set<int*> pending;  // events that were recorded since the last wait
thread_local bool is_context_current;
char context, stream, module_;
constexpr char MARK[] = "the whole handle came, by value";

CUresult checked(bool is_right) { return is_right ? static_cast<CUresult>(CUDA_SUCCESS) : static_cast<CUresult>(CUDA_ERROR_INVALID_VALUE); }
CUresult ok() { return static_cast<CUresult>(CUDA_SUCCESS); }

}  // namespace

extern "C" {

int stub_num_allocations() { return static_cast<int>(allocations.size()); }

CUresult cuInit(unsigned flags) { return checked(flags == 0); }
CUresult cuDeviceGetCount(int* count) { *count = 3; return ok(); }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { *device = ordinal; return checked(ordinal >= 0 && ordinal < 3); }
CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { std::memset(uuid, 'a' + device, 16); return ok(); }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
    return ok();
}
CUresult cuDeviceCanAccessPeer(int* can, CUdevice, CUdevice peer) { *can = peer == 1; return ok(); }
CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice) { *made = reinterpret_cast<CUcontext>(&context); return ok(); }
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return ok(); }
CUresult cuCtxSetCurrent(CUcontext given) {
    is_context_current = reinterpret_cast<char*>(given) == &context;
    return checked(is_context_current);
}
CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return ok(); }
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr at) { const std::lock_guard lock(mutex);
    for (auto [start, size] : allocations) {
        if (at < start || at >= start + size) continue;
        switch (static_cast<int>(attribute)) {
            case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<CUdeviceptr*>(data) = start; return ok();
            case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(data) = size; return ok();
            case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: *static_cast<int*>(data) = 1; return ok();
        }
    }
    return checked(false);
}
CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr start) { const std::lock_guard lock(mutex);
    std::memset(handle, 0, sizeof(*handle));
    std::memcpy(handle->reserved, &start, sizeof(start));
    std::memcpy(handle->reserved + 64 - sizeof(MARK), MARK, sizeof(MARK));
    return checked(allocations.count(start));
}
CUresult cuIpcOpenMemHandle(CUdeviceptr* start, CUipcMemHandle handle, unsigned flags) {
    if (std::memcmp(handle.reserved + 64 - sizeof(MARK), MARK, sizeof(MARK))) return static_cast<CUresult>(CUDA_ERROR_INVALID_HANDLE);
    std::memcpy(start, handle.reserved, sizeof(*start));
    return checked(flags == 1);
}
CUresult cuIpcCloseMemHandle(CUdeviceptr start) { const std::lock_guard lock(mutex); return checked(allocations.count(start)); }
CUresult cuStreamCreateWithPriority(CUstream* made, unsigned flags, int priority) {
    *made = reinterpret_cast<CUstream>(&stream);
    return checked(is_context_current && flags == 1 && priority == -5);
}
CUresult cuStreamSynchronize(CUstream given) { const std::lock_guard lock(mutex);
    for (int* event : pending) *event = 0;
    pending.clear();
    return checked(reinterpret_cast<char*>(given) == &stream);
}
CUresult cuStreamDestroy(CUstream given) { return checked(reinterpret_cast<char*>(given) == &stream); }
CUresult cuEventCreate(CUevent* made, unsigned flags) { *made = reinterpret_cast<CUevent>(new int(0)); return checked(flags == 2); }
CUresult cuEventRecord(CUevent event, CUstream given) { const std::lock_guard lock(mutex);
    *reinterpret_cast<int*>(event) = 1;
    pending.insert(reinterpret_cast<int*>(event));
    return checked(reinterpret_cast<char*>(given) == &stream);
}
CUresult cuEventQuery(CUevent event) { const std::lock_guard lock(mutex);
    return (*reinterpret_cast<int*>(event))-- > 0 ? static_cast<CUresult>(CUDA_ERROR_NOT_READY) : ok();
}
CUresult cuEventDestroy(CUevent event) { const std::lock_guard lock(mutex); pending.erase(reinterpret_cast<int*>(event)); delete reinterpret_cast<int*>(event); return ok(); }
CUresult cuMemAlloc(CUdeviceptr* start, size_t num_bytes) { const std::lock_guard lock(mutex);
    *start = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(256, (num_bytes + 255) / 256 * 256));
    allocations[*start] = num_bytes;
    return ok();
}
CUresult cuMemFree(CUdeviceptr start) { const std::lock_guard lock(mutex);
    if (!allocations.erase(start)) return checked(false);
    std::free(reinterpret_cast<void*>(start));
    return ok();
}
CUresult cuMemAllocHost(void** start, size_t num_bytes) { *start = std::malloc(num_bytes); return ok(); }
CUresult cuMemFreeHost(void* start) { std::free(start); return ok(); }
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t num_bytes, CUstream) {
    std::memcpy(reinterpret_cast<void*>(to), from, num_bytes);
    return ok();
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t num_bytes, CUstream) {
    std::memcpy(to, reinterpret_cast<void*>(from), num_bytes);
    return ok();
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t num_bytes, CUstream) {
    std::memset(reinterpret_cast<void*>(to), value, num_bytes);
    return ok();
}
CUresult cuModuleLoadData(CUmodule* made, const void* image) {
    *made = reinterpret_cast<CUmodule>(&module_);
    return checked(!std::memcmp(image, "stub", 4));
}
CUresult cuModuleUnload(CUmodule given) { return checked(reinterpret_cast<char*>(given) == &module_); }
CUresult cuModuleGetFunction(CUfunction* found, CUmodule, const char* name) {
    *found = reinterpret_cast<CUfunction>(!std::strcmp(name, "baton_copy") ? 1 : 2);
    return checked(!std::strcmp(name, "baton_copy") || !std::strcmp(name, "baton_digest"));
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream, void** arguments, void** extra) {
    const std::lock_guard lock(mutex);
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared || extra || block != THREADS) return checked(false);
    const auto* pieces = *static_cast<const Piece**>(arguments[0]);
    const unsigned num_pieces = *static_cast<unsigned*>(arguments[1]);
    const u64 num_units = *static_cast<u64*>(arguments[2]);
    for (unsigned b = 0; b < grid; ++b) {
        if (reinterpret_cast<uintptr_t>(function) == 1) {
            for (unsigned t = 0; t < THREADS; ++t) {
                threadIdx.x = t;
                blockIdx.x = b;
                baton_copy(pieces, num_pieces, num_units);
            }
            continue;
        }
        std::barrier<> all(THREADS);
        meeting = &all;
        std::vector<std::thread> threads;
        for (unsigned t = 0; t < THREADS; ++t)
            threads.emplace_back([=] {
                threadIdx.x = t;
                blockIdx.x = b;
                baton_digest(pieces, num_pieces, num_units, *static_cast<u64**>(arguments[3]));
            });
        for (auto& thread : threads) thread.join();
    }
    return ok();
}
CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = static_cast<int>(error) == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OTHER";
    return ok();
}

}  // extern "C"
