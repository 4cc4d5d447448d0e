// The ops that the library registers; schemas and docstrings are in dblocks/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace dblocks {

using MaybeTensor = std::optional<torch::stable::Tensor>;
using MaybeType = std::optional<torch::headeronly::ScalarType>;

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
adaln_forward(
    const torch::stable::Tensor& x, const MaybeTensor& branch, const MaybeTensor& gate,
    const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& weight,
    const MaybeTensor& bias, bool normalise, bool rms, double eps,
    torch::headeronly::ScalarType out_type);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
adaln_backward(
    const MaybeTensor& dy, const MaybeTensor& dx_new, const torch::stable::Tensor& x,
    const MaybeTensor& branch, const MaybeTensor& gate, const MaybeTensor& shift,
    const MaybeTensor& scale, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& mean, const MaybeTensor& rstd, bool rms,
    const std::vector<bool>& needs);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> noise_inject_forward(
    const torch::stable::Tensor& y, const torch::stable::Tensor& sigma, const MaybeTensor& seed,
    int64_t seed_number, int64_t offset, double sigma_data, torch::headeronly::ScalarType type,
    bool need_z);

torch::stable::Tensor noise_inject_backward(
    const MaybeTensor& dz, const torch::stable::Tensor& dz_in, const torch::stable::Tensor& sigma,
    double sigma_data, torch::headeronly::ScalarType type);

torch::stable::Tensor edm_denoise_forward(
    const torch::stable::Tensor& f, const torch::stable::Tensor& z,
    const torch::stable::Tensor& sigma, double sigma_data);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> edm_denoise_backward(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& sigma, double sigma_data,
    const MaybeType& f_type, const MaybeType& z_type);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> edm_loss_forward(
    const torch::stable::Tensor& f, const torch::stable::Tensor& y,
    const torch::stable::Tensor& sigma, const MaybeTensor& seed, int64_t seed_number,
    int64_t offset, double sigma_data, const MaybeTensor& row_weight, bool need_rest);

torch::stable::Tensor edm_loss_backward(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& rest,
    const MaybeTensor& row_weight, torch::headeronly::ScalarType type);

torch::stable::Tensor euler_step_forward(
    const torch::stable::Tensor& z, const torch::stable::Tensor& denoised,
    const MaybeTensor& sigma, const MaybeTensor& sigma_next, double sigma_value,
    double sigma_next_value);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> euler_step_backward(
    const torch::stable::Tensor& grad, const MaybeTensor& sigma, const MaybeTensor& sigma_next,
    double sigma_value, double sigma_next_value, const MaybeType& z_type,
    const MaybeType& denoised_type);

}  // namespace dblocks
