"""What is measured: Frechet distances, PSNR, SSIM, LPIPS, a linear probe, codebook use."""
