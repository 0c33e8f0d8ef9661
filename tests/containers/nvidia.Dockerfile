# A stand-in for NVIDIA's image: the wheel's tritonserver 2.51, laid out under /opt/tritonserver as
# theirs is, with the Python-based `pytorch` backend and torch where theirs is in C++.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt server/vit_server/backends/pytorch/model.py model_repository/preprocess/1/pulse.py /tmp/
RUN pip install --no-cache-dir --break-system-packages --extra-index-url "$TORCH_INDEX" \
        -c /tmp/constraints.txt torch numpy \
    && pip install --no-cache-dir --break-system-packages --no-deps --target /tmp/wheel \
        -c /tmp/constraints.txt nvidia-pytriton \
    && mkdir -p /opt/tritonserver /opt/nvidia \
    && cd /tmp/wheel/pytriton/tritonserver \
    && cp python_backend_stubs/3.11/triton_python_backend_stub backends/python/ \
    && mv bin backends /opt/tritonserver/ \
    && mv /tmp/wheel/nvidia_pytriton.libs /opt/tritonserver/lib \
    && mkdir /opt/tritonserver/backends/pytorch \
    && mv /tmp/model.py /tmp/pulse.py /opt/tritonserver/backends/pytorch/ \
    && rm -r /tmp/wheel /tmp/constraints.txt \
    && printf '#!/bin/sh\nexec "$@"\n' > /opt/nvidia/nvidia_entrypoint.sh \
    && chmod +x /opt/nvidia/nvidia_entrypoint.sh
ENV LD_LIBRARY_PATH=/opt/tritonserver/lib PATH=/opt/tritonserver/bin:$PATH TRITON_SERVER_VERSION=2.51.0
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]
