def test_x(demo=None):
    import os,sys,torch,time
    print(os.environ.get("OMP_WAIT_POLICY"), torch.get_num_threads())
    print(torch.__config__.parallel_info())
    import ctypes
    print([l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.lower()][:6])
    t=time.time();p=time.process_time()
    a=torch.randn(17,256);b=torch.randn(256,704)
    for i in range(500): a@b; (a@b).topk(3)
    print(time.time()-t,time.process_time()-p)
