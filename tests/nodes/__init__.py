"""Several hosts on one machine: network namespaces with an sshd in each, and the real deepspeed launcher."""
