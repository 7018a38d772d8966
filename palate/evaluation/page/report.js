(function(){
[].forEach.call(document.querySelectorAll('.compared'),function(part){
var pairs=part.querySelector('.pairs'),tools=part.querySelector('.tools');
if(!pairs||!tools)return;
tools.hidden=false;
var buttons={side:tools.querySelector('.side'),slid:tools.querySelector('.over'),stacked:tools.querySelector('.stack')};
var all=tools.querySelector('.all');
var views=[].slice.call(pairs.querySelectorAll('.views'));
function sides(v){return [].slice.call(v.querySelectorAll('.view'))}
function turn(v,n){var s=sides(v);v.dataset.on=String((n+s.length)%s.length);
s.forEach(function(x,i){x.classList.toggle('on',i===+v.dataset.on)});
v.setAttribute('aria-label','Shown: '+s[+v.dataset.on].querySelector('span').textContent+'. Press for the next')}
function show(mode){
['slid','stacked'].forEach(function(m){pairs.classList.toggle(m,m===mode)});
Object.keys(buttons).forEach(function(m){if(buttons[m])buttons[m].setAttribute('aria-pressed',String(m===mode))});
all.hidden=mode!=='stacked';
views.forEach(function(v){
var old=v.querySelector('.slide');if(old)v.removeChild(old);
['tabindex','role','aria-label'].forEach(function(a){v.removeAttribute(a)});
if(mode==='stacked'){v.tabIndex=0;v.setAttribute('role','button');turn(v,sides(v).length-1)}
if(mode==='slid'){var r=document.createElement('input');r.type='range';r.className='slide';r.min=0;r.max=100;r.value=50;
r.setAttribute('aria-label','How much of the first picture is shown, in percent');
r.oninput=function(){v.style.setProperty('--cut',r.value+'%')};r.oninput();v.appendChild(r)}
});}
buttons.side.onclick=function(){show('side')};
if(buttons.slid)buttons.slid.onclick=function(){show('slid')};
buttons.stacked.onclick=function(){show('stacked')};
all.onclick=function(){var n=+views[0].dataset.on+1;views.forEach(function(v){turn(v,n)})};
views.forEach(function(v){
v.onclick=function(){if(pairs.classList.contains('stacked'))turn(v,+v.dataset.on+1)};
v.onkeydown=function(e){if(!pairs.classList.contains('stacked'))return;
var by={' ':1,Enter:1,ArrowRight:1,ArrowLeft:-1}[e.key];if(by){e.preventDefault();turn(v,+v.dataset.on+by)}};
});
});
})();
